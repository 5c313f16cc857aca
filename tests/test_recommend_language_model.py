"""The flat decoder with the body of a pretrained language model: likelihoods, search, training, reinforcement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_recommend_architectures import ITEMS, circle_paths, circle_split
from test_recommend_grpo import _config
from test_recommend_train import write_catalogue, write_sids
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mmsid.errors import ConfigError
from mmsid.recommend.beam_search import beam_item_scores, beam_search
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.paths import PathTrie
from mmsid.recommend.reinforce import run
from mmsid.recommend.train import ModelConfig
from mmsid.recommend.training import Schedule, build, fit

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig, False), "qwen2": (Qwen2ForCausalLM, Qwen2Config, True)}  # True: one table for both ends


@pytest.fixture(scope="module", params=KINDS)
def language_model(request, tmp_path_factory) -> str:
    model, config, tied = KINDS[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    made = config(vocab_size=90, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=85, eos_token_id=86, **SIZES)
    model(made).save_pretrained(folder)
    return str(folder)


def test_the_body_is_the_pretrained_one_and_the_words_are_sid_tokens(language_model):
    paths = circle_paths()
    model = build(paths, FlatShape(max_history=3, language_model=language_model)).language_model
    before = AutoModelForCausalLM.from_pretrained(language_model)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, before.model.layers[1].mlp.up_proj.weight)
    table = model.get_input_embeddings().weight
    assert table.shape == (13, 32) and model.get_output_embeddings().weight is table
    assert (model.config.vocab_size, model.config.bos_token_id, model.generation_config.eos_token_id) == (13, 12, None)
    scale = before.get_input_embeddings().weight.std().item()
    assert table.std().item() == pytest.approx(scale, rel=0.2)


def test_search_scores_are_the_likelihoods_that_training_counts(language_model):
    paths = circle_paths()
    model = build(paths, FlatShape(max_history=3, language_model=language_model)).eval()
    trie, histories = PathTrie.build(paths), [np.array([3]), np.array([7, 8, 9])]
    with torch.no_grad():
        steps = model.steps(pad_histories(histories, 3))
        scores = beam_item_scores(beam_search(steps, trie, torch.full((2, 1), -1), beam=ITEMS), trie)
        assert scores.exp().sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
        for row, history in enumerate(histories):
            for item in (0, 11):
                whole = model(torch.from_numpy(np.append(history, item))[None])
                assert float(model(torch.from_numpy(history)[None]) - whole) == pytest.approx(float(scores[row, item]), abs=1e-4)


def test_it_learns_and_starts_from_the_same_words_with_the_same_seed(language_model):
    shape = FlatShape(max_history=3, language_model=language_model)
    schedule = Schedule(epochs=20, batch_size=32, lr=0.01, patience=20)
    fitted = fit(circle_paths(), circle_split(), shape=shape, schedule=schedule, seed=0)
    assert fitted.evaluate(circle_split(), "test", beam=10).summary()["HR@1"] > 0.9  # chance is 1 / 30
    one, other = (fit(circle_paths(), circle_split(), shape=shape, schedule=Schedule(epochs=1), seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_grpo_reinforces_it_and_the_saved_folder_is_a_plain_causal_model(language_model, tmp_path):
    folder = tmp_path / "data"
    write_sids(folder / "random.parquet", write_catalogue(folder))
    out = run(_config(folder, model={"language_model": language_model, "max_history": 4}, variants=["rl"]))
    before, after = (AutoModelForCausalLM.from_pretrained(out / "models" / name / "0") for name in ("supervised", "rl"))
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)
    assert after.get_input_embeddings().weight is after.get_output_embeddings().weight


def test_wrong_settings_name_the_key(language_model, tmp_path):
    with pytest.raises(ConfigError, match="read by the flat decoder alone, not by tiger"):
        ModelConfig(language_model=language_model).shape("tiger")
    with pytest.raises(ConfigError, match="sets the sizes of the model; remove d_model, layers"):
        ModelConfig(language_model=language_model, d_model=8, layers=2).shape("flat")
    with pytest.raises(ConfigError, match=r"reads 64 tokens, but model\.max_history needs 83; lower max_history"):
        build(circle_paths(), FlatShape(max_history=40, language_model=language_model))
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        build(circle_paths(), FlatShape(max_history=3, language_model=str(tmp_path)))
