"""A behaviour input added to a content tokenizer: codes stay, states of known items differ from those of new ones, and it is saved."""

import numpy as np
import pytest
import torch
from test_refine_stage import make_catalog
from tiny_backbones import tiny_bert

from mmsid.catalog import read_catalog, split_histories
from mmsid.refine.gate import HeldOutPairs
from mmsid.tokenizer.added_behaviour import add_behaviour
from mmsid.tokenizer.behaviour import behaviour_of_catalog
from mmsid.tokenizer.inputs import load_inputs
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer, TokenizerSettings


@pytest.mark.parametrize("head", ["residual", "parallel"])
def test_codes_stay_and_behaviour_is_read(head, tmp_path):
    config = make_catalog(tmp_path, np.random.default_rng(0))
    catalog = read_catalog(config)
    split = split_histories(catalog, config.split)
    backbone = BackboneSettings(path=tiny_bert(tmp_path / "bert"), max_length=32)
    size = 32  # the hidden size of the tiny model
    tokenizer = ItemTokenizer(
        TokenizerSettings(
            backbone=backbone, head=head, num_levels=2, codebook_size=8, code_dim=size + 2, embedding_dim=size, use=("title",)
        )
    ).eval()
    assert tokenizer.backbone.hidden_size == size
    inputs, _ = load_inputs(catalog, None, None, ("title",))
    before = tokenizer.encode(inputs)
    with torch.no_grad():
        states = tokenizer.hidden(tokenizer.collate(inputs))[0]
    pairs = HeldOutPairs.from_histories(split.held_out_histories()).pairs
    added = add_behaviour(tokenizer, states, catalog, split, pairs, (), seed=0)
    assert (added.interactions > 0).all() and len(added.vectors) == len(inputs)

    known = tokenizer.encode(added.added_to(inputs))
    assert torch.equal(tokenizer.encode(inputs).raw_codes, before.raw_codes) and torch.equal(known.raw_codes, before.raw_codes)
    assert not torch.allclose(known.scores, tokenizer.encode(inputs).scores), "ready to learn from behaviour"
    torch.testing.assert_close(known.embedding, before.embedding)

    tokenizer.save_pretrained(tmp_path / "saved")
    again = ItemTokenizer.from_pretrained(tmp_path / "saved")
    read = behaviour_of_catalog(again.behaviour, catalog, split)
    np.testing.assert_allclose(read.vectors, added.vectors, atol=1e-5)
    torch.testing.assert_close(again.encode(read.added_to(inputs)).scores, known.scores, rtol=1e-4, atol=1e-4)


def test_weights_of_behaviour_move_codes_of_known_items_only(tmp_path):
    """In a parallel head, the weights of one behaviour coordinate push the first code of the items that have it."""
    config = make_catalog(tmp_path, np.random.default_rng(0))
    catalog = read_catalog(config)
    split = split_histories(catalog, config.split)
    backbone = BackboneSettings(path=tiny_bert(tmp_path / "bert"), max_length=32)
    tokenizer = ItemTokenizer(TokenizerSettings(backbone=backbone, head="parallel", num_levels=2, codebook_size=8, use=("title",))).eval()
    inputs, _ = load_inputs(catalog, None, None, ("title",))
    with torch.no_grad():
        states = tokenizer.hidden(tokenizer.collate(inputs))[0]
    added = add_behaviour(tokenizer, states, catalog, split, np.zeros((0, 2), np.int64), (), seed=0)
    with torch.no_grad():
        tokenizer.head.projection.weight.zero_()
        tokenizer.head.bias.zero_()
        tokenizer.head.vectors[0, 5] = 1000 * torch.from_numpy(added.vectors[0])
    before, after = (tokenizer.encode(given).raw_codes for given in (inputs, added.added_to(inputs)))
    products = np.array([item.title.split()[1] for item in catalog.items])
    assert (after[products == products[0], 0] == 5).all(), "items of one product are engaged together"
    assert torch.equal(before[:, 1], after[:, 1]) and (after[:, 0] != before[:, 0]).any()


def test_without_histories_nothing_is_added(tmp_path):
    config = make_catalog(tmp_path, np.random.default_rng(0)).model_copy(update={"sequences": None})
    catalog = read_catalog(config)
    split = split_histories(catalog, config.split)
    backbone = BackboneSettings(path=tiny_bert(tmp_path / "bert"), max_length=32)
    tokenizer = ItemTokenizer(TokenizerSettings(backbone=backbone, head="parallel", num_levels=2, codebook_size=8, use=("title",)))
    states = torch.zeros(len(catalog.items), 2, tokenizer.backbone.hidden_size)
    assert add_behaviour(tokenizer, states, catalog, split, np.zeros((0, 2), np.int64), (), seed=0) is None and tokenizer.behaviour is None
