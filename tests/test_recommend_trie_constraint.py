"""The masking step and the logits processor allow exactly the continuations that exist in the catalogue."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from mmsid.recommend import trie_constraint
from mmsid.recommend.trie_constraint import TrieConstraint, TrieLogitsProcessor
from mmsid.sids.trie import Trie

END, BEGIN, VOCABULARY = 20, 21, 24
# three levels (3, 4 and 5 codes, the last one a ragged suffix); the token ranges are not in level order
TOKEN_IDS = [[10, 11, 12], [0, 1, 2, 3], [4, 5, 6, 7, 8]]
CODES = np.array([[0, 1, 0], [0, 1, 1], [0, 3, -1], [2, 0, -1], [2, 2, 4]])


def tokens_of(codes: np.ndarray) -> list[list[int]]:
    return [[TOKEN_IDS[level][code] for level, code in enumerate(row) if code >= 0] for row in codes.tolist()]


def following(prefix: list[int], codes: np.ndarray) -> set[int]:
    """Tokens that may follow a prefix, from the list of SIDs."""
    sids = tokens_of(codes)
    allowed = {sid[len(prefix)] for sid in sids if len(sid) > len(prefix) and sid[: len(prefix)] == prefix}
    if prefix in sids or not any(sid[: len(prefix)] == prefix for sid in sids):
        allowed.add(END)
    return allowed


def allowed_rows(processor: TrieLogitsProcessor, input_ids: list[list[int]]) -> list[set[int]]:
    scores = torch.randn(len(input_ids), VOCABULARY)
    masked = processor(torch.tensor(input_ids), scores)
    real = torch.isfinite(masked)
    assert torch.equal(masked[real], scores[real])
    return [set(row.nonzero()[:, 0].tolist()) for row in real]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("cells", [0, 1 << 22], ids=["sparse", "dense"])
def test_every_prefix_allows_exactly_the_continuations_of_items(cells, data):
    rows = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(-1, 4)), min_size=1, max_size=12))
    codes = np.array(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_constraint, "DENSE_CELLS", cells)
        trie = Trie.from_codes(codes, (3, 4, 5))
        processor = TrieLogitsProcessor(trie, TOKEN_IDS, prompt_length=2, end_token_id=END)
    for length in range(5):
        known = {tuple(sid[:length]) for sid in tokens_of(codes) if len(sid) >= length}
        any_tokens = data.draw(st.lists(st.lists(st.integers(0, END), min_size=length, max_size=length), max_size=4))
        prefixes = [list(prefix) for prefix in sorted(known)] + any_tokens
        if prefixes:
            expected = [following(prefix, codes) for prefix in prefixes]
            assert allowed_rows(processor, [[9, 21, *prefix] for prefix in prefixes]) == expected


def test_a_row_that_can_only_end_ends_even_with_end_score_minus_infinity():
    processor = TrieLogitsProcessor(Trie.from_codes(CODES, (3, 4, 5)), TOKEN_IDS, prompt_length=0, end_token_id=END)
    scores = torch.full((1, VOCABULARY), -torch.inf)
    for prefix in ([10, 2], [12, 2, 8], [10, 3]):  # not a SID, complete, complete without a suffix
        assert torch.isfinite(processor(torch.tensor([prefix]), scores)).nonzero().tolist() == [[0, END]]


def test_without_an_end_token_a_row_without_continuation_is_an_error():
    trie = Trie.from_codes(CODES[:, :2], (3, 4))
    processor = TrieLogitsProcessor(trie, TOKEN_IDS[:2], prompt_length=1)
    assert allowed_rows(processor, [[9], [9]]) == [{10, 12}, {10, 12}]
    with pytest.raises(ValueError, match=r"row 1 .*no SID has its prefix"):
        processor(torch.tensor([[9, 10], [9, 11]]), torch.zeros(2, VOCABULARY))
    with pytest.raises(ValueError, match=r"row 0 .*its SID is complete"):
        processor(torch.tensor([[9, 10, 1]]), torch.zeros(1, VOCABULARY))


def test_invalid_arguments_raise_errors_with_the_remedy():
    trie = Trie.from_codes(CODES, (3, 4, 5))
    with pytest.raises(ValueError, match=r"has \[3, 4\] tokens per level, the trie has \[3, 4, 5\]"):
        TrieLogitsProcessor(trie, TOKEN_IDS[:2], prompt_length=1, end_token_id=END)
    with pytest.raises(ValueError, match="1 columns, fewer than prompt_length 2"):
        TrieLogitsProcessor(trie, TOKEN_IDS, prompt_length=2, end_token_id=END)(torch.tensor([[9]]), torch.zeros(1, VOCABULARY))
    with pytest.raises(ValueError, match="give end_token_id, otherwise a SID without suffix cannot end"):
        TrieLogitsProcessor(trie, TOKEN_IDS, prompt_length=1)


def test_sparse_and_dense_levels_agree(monkeypatch):
    codes = np.random.default_rng(0).integers(0, [6, 5, 40], (80, 3))
    trie = Trie.from_codes(codes, (6, 5, 40))
    mixed = TrieConstraint.from_trie(trie)
    monkeypatch.setattr(trie_constraint, "DENSE_CELLS", 0)
    sparse = TrieConstraint.from_trie(trie)
    assert [level.penalty is None for level in mixed.levels] == [False, False, True]
    for level, other in zip(mixed.levels, sparse.levels, strict=True):
        nodes = torch.arange(len(level.first) - 1)
        logits = torch.randn(len(nodes), level.size)
        torch.testing.assert_close(level.mask(logits, nodes).logsumexp(1), other.mask(logits, nodes).logsumexp(1))
        all_codes = torch.arange(level.size).expand(len(nodes), -1)
        assert torch.equal(level.step(nodes[:, None], all_codes), other.step(nodes[:, None], all_codes))
        for rule in (level, other):
            parent, child = nodes.repeat_interleave(level.first.diff()), torch.arange(len(level.code))
            assert torch.equal(rule.follow(parent, rule.candidate(parent, child)), child)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=END)).eval()


def test_generate_returns_all_sids_with_more_beams_than_items(model):
    processor = TrieLogitsProcessor(Trie.from_codes(CODES, (3, 4, 5)), TOKEN_IDS, prompt_length=2, end_token_id=END)
    prompts = torch.tensor([[9, BEGIN], [13, BEGIN]])
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        num_beams=8,
        num_return_sequences=8,
        max_new_tokens=4,
        do_sample=False,
        length_penalty=0.0,
        renormalize_logits=True,
        logits_processor=[processor],
        pad_token_id=END,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sids = {tuple(sid) for sid in tokens_of(CODES)}
    finite = found.sequences_scores.view(2, 8) > -1e8
    for user in range(2):
        rows = found.sequences.view(2, 8, -1)[user][finite[user]][:, 2:].tolist()
        assert {tuple(token for token in row if token != END) for row in rows} == sids
        assert found.sequences_scores.view(2, 8)[user][finite[user]].exp().sum().item() == pytest.approx(1.0, abs=1e-4)


def test_sampling_with_left_padded_prompts_of_different_lengths(model):
    processor = TrieLogitsProcessor(Trie.from_codes(CODES, (3, 4, 5)), TOKEN_IDS, prompt_length=3, end_token_id=END)
    prompts = torch.tensor([[END, END, BEGIN], [9, 13, BEGIN]]).repeat(16, 1)
    torch.manual_seed(1)
    sequences = model.generate(
        prompts, attention_mask=(prompts != END).long(), do_sample=True, max_new_tokens=4, logits_processor=[processor], pad_token_id=END
    )
    sids = {tuple(sid) for sid in tokens_of(CODES)}
    found = {tuple(token for token in row if token != END) for row in sequences[:, 3:].tolist()}
    assert found <= sids and len(found) > 2
