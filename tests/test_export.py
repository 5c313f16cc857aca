"""`mmsid export`: each format read back as its description says. The consumers' own readers are tried in test_export_consumers.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from export_parts import CODES, IDS, SIZES, shop, sid_folder, tiny_language_model
from tiny_backbones import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from mmsid.catalog import read_catalog, split_histories
from mmsid.catalog.config import CatalogConfig
from mmsid.cli import main
from mmsid.errors import ArtifactError, ConfigError
from mmsid.export.export import export_sids
from mmsid.export.text_model import embedding_rows, initialize_sid_rows
from mmsid.sids.code_vectors import CodeVectors, code_vectors


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return tiny_language_model(tmp_path_factory.mktemp("lm"))


def test_flashrec_vocabulary_has_one_key_per_path_and_all_items(tmp_path):
    folder = sid_folder(tmp_path / "sids")
    main(["export", str(folder), "--format", "flashrec", "--out", str(tmp_path / "flashrec")])
    found = json.loads((tmp_path / "flashrec" / "sid_vocab.json").read_text())
    assert found == {"0,0,3": ["cat"], "0,1,2": ["ant", "bee"], "2,1,0": ["dog"], "2,1,1": ["eel"]}


def test_flashrec_paths_have_one_length_and_token_ids_one_block(tmp_path, language_model):
    suffix = np.array([0, 1, -1, -1, -1])
    folder = sid_folder(tmp_path / "sids", suffix=suffix)
    export_sids(folder, tmp_path / "flashrec", "flashrec", model=language_model)
    found = json.loads((tmp_path / "flashrec" / "sid_vocab.json").read_text())
    assert found == {"0,1,2,0": ["ant"], "0,1,2,1": ["bee"], "0,0,3,0": ["cat"], "2,1,0,0": ["dog"], "2,1,1,0": ["eel"]}
    text_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "flashrec")
    names = [f"<s_{letter}_{code}>" for letter, size in zip("abcd", (3, 2, 4, 3)) for code in range(size)]
    ids = text_tokenizer.convert_tokens_to_ids([*names, "<|sid_begin|>", "<|sid_end|>"])
    assert ids == list(range(ids[0], ids[0] + 14))
    layout = json.loads((tmp_path / "flashrec" / "manifest.json").read_text())["extra"]["sid"]
    assert layout == f"{ids[0]}:{ids[-3]}/3,2,4,3"
    with pytest.raises(ArtifactError, match="no consecutive ids"):  # the same tokens twice, with others between them
        text_tokenizer.add_tokens(["x0"])
        text_tokenizer.save_pretrained(tmp_path / "longer")
        wider = sid_folder(tmp_path / "wider", codes=CODES, sizes=(4, 2, 4), suffix=suffix)
        export_sids(wider, tmp_path / "again", "flashrec", tokenizer=tmp_path / "longer")


def test_nvidia_lines_are_distinct_paths_of_token_ids(tmp_path, language_model):
    folder = sid_folder(tmp_path / "sids")
    export_sids(folder, tmp_path / "plain", "nvidia")
    lines = [json.loads(line) for line in (tmp_path / "plain" / "items.jsonl").read_text().splitlines()]
    assert [line["token_ids"] for line in lines] == [[0, 4, 7], [0, 3, 8], [2, 4, 5], [2, 4, 6]]  # offsets 0, 3, 5
    assert [line["item_id"] for line in lines] == ["ant", "cat", "dog", "eel"]
    assert lines[0]["metadata"] == {"sid": "<a_0><b_1><c_2>", "item_ids": ["ant", "bee"]} and lines[1]["metadata"] == {
        "sid": "<a_0><b_0><c_3>"
    }
    export_sids(folder, tmp_path / "llm", "nvidia", tokenizer=language_model)
    text_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    for line in map(json.loads, (tmp_path / "llm" / "items.jsonl").read_text().splitlines()):
        assert text_tokenizer.decode(line["token_ids"]).replace(" ", "") == line["metadata"]["sid"]


def test_nvidia_whole_number_ids_stay_numbers_and_suffixes_are_optional(tmp_path):
    folder = sid_folder(tmp_path / "sids", ids=["4", "3", "2", "1", "0"], suffix=np.array([0, 1, -1, -1, -1]), integer_ids=True)
    export_sids(folder, tmp_path / "out", "nvidia")
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [line["item_id"] for line in lines] == [4, 3, 2, 1, 0]
    assert [len(line["token_ids"]) for line in lines] == [4, 4, 3, 3, 3] and lines[1]["token_ids"][-1] == 10


def test_huggingface_model_reads_a_sid_as_its_tokens_and_rows_follow_code_vectors(tmp_path, language_model):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6))
    embeddings = (centres[CODES[:, 0]] + 0.1 * rng.normal(size=(5, 6))).astype(np.float32)
    folder = sid_folder(tmp_path / "sids", embeddings=embeddings)
    main(["export", str(folder), "--format", "huggingface", "--model", str(language_model), "--out", str(tmp_path / "out")])
    text_tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = text_tokenizer.encode("red <a_2><b_1><c_0> shoe", add_special_tokens=False)
    assert text_tokenizer.convert_ids_to_tokens(ids)[1:].count("<a_2>") == 1 and "<c_0>" in text_tokenizer.convert_ids_to_tokens(ids)
    weight, before = model.get_input_embeddings().weight.detach(), AutoModelForCausalLM.from_pretrained(language_model)
    old = before.get_input_embeddings().weight.detach()
    known = len(tiny_tokenizer())
    assert torch.equal(weight[:known], old[:known]) and len(weight) == len(text_tokenizer)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    row = {text: weight[text_tokenizer.convert_tokens_to_ids(text)].double() for text in ("<a_0>", "<a_2>", "<c_0>", "<c_1>")}
    found = code_vectors(CODES, SIZES, embeddings)
    ratio = float((row["<a_0>"] - row["<a_2>"]).norm()) / np.linalg.norm(found[0].vectors[0] - found[0].vectors[2])
    centred = old - old.mean(0)
    deviation = float((row["<a_0>"] - weight[:known].double().mean(0)).norm())
    assert ratio > 0 and 0.5 < deviation / float(centred.norm(dim=1).median()) < 2
    out = model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape[1] == len(ids) + 2


def test_huggingface_tokenizer_and_rows_for_a_model_of_ones_own(tmp_path, language_model):
    embeddings = np.random.default_rng(1).normal(size=(5, 24)).astype(np.float32)  # wider than the model: principal components
    export_sids(sid_folder(tmp_path / "sids", embeddings=embeddings), tmp_path / "out", "huggingface", tokenizer=language_model)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=10, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False)
    )
    assert initialize_sid_rows(model, tmp_path / "out") == 2 + 2 + 4  # codes that an item has
    text_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == len(text_tokenizer) == model.get_output_embeddings().weight.shape[0]
    ids = text_tokenizer.convert_tokens_to_ids(["<a_0>", "<a_2>"])
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert float((weight[ids[0]] - weight[ids[1]]).norm()) > 0
    with pytest.raises(ArtifactError, match=r"no sid_rows\.safetensors"):
        initialize_sid_rows(model, tmp_path / "sids")


def test_without_embeddings_the_rows_start_from_the_mean_and_a_warning_says_so(tmp_path, language_model):
    with pytest.warns(UserWarning, match=r"embeddings\.safetensors does not exist"):
        export_sids(sid_folder(tmp_path / "sids"), tmp_path / "out", "huggingface", model=language_model)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["rows_initialised"] == 0


def test_embedding_rows_keep_distances_and_the_range_of_the_model():
    rng = np.random.default_rng(2)
    levels = [CodeVectors(rng.normal(size=(8, 5)), np.arange(8) < 6), CodeVectors(0.01 * rng.normal(size=(4, 5)), np.ones(4, bool))]
    reference = torch.from_numpy(rng.normal(3, 2, size=(500, 12)))
    typical = float((reference - reference.mean(0)).norm(dim=1).median())
    for level, rows in zip(levels, embedding_rows(levels, reference), strict=True):
        used = rows[torch.from_numpy(level.used)]
        assert float((used - reference.mean(0)).norm(dim=1).median()) == pytest.approx(typical)
        wanted = np.linalg.norm(level.vectors[:, None] - level.vectors[None], axis=-1)[np.ix_(level.used, level.used)]
        found = torch.cdist(used, used).numpy()
        off = ~np.eye(len(used), dtype=bool)
        assert np.ptp(found[off] / wanted[off]) < 1e-6  # one factor for all distances


def test_code_vectors_are_mean_residuals():
    x = np.array([[1.0, 0], [3, 0], [0, 2], [0, 6]])
    first, second = code_vectors(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), (3, 2), x)
    assert first.vectors.tolist() == [[2, 0], [0, 4], [0, 0]] and first.used.tolist() == [True, True, False]
    assert second.vectors.tolist() == [[-0.5, -1], [0.5, 1]]
    with pytest.raises(ValueError, match="one embedding per item"):
        code_vectors(np.zeros((3, 1), int), (1,), x)


def test_minionerec_data_set(tmp_path):
    folder, config = sid_folder(tmp_path / "sids"), shop(tmp_path)
    out = tmp_path / "Ads"
    main(["export", str(folder), "--format", "minionerec", "--config", str(config), "--out", str(out)])
    names = {path.name for path in out.iterdir()}
    assert {f"Ads.{end}" for end in ("index.json", "item.json", "train.inter", "valid.inter", "test.inter", "item2id", "user2id")} <= names
    number = dict(line.split("\t") for line in (out / "Ads.item2id").read_text().splitlines())
    index = json.loads((out / "Ads.index.json").read_text())
    assert {item: index[number[item]] for item in IDS} == {
        item: [f"<{letter}_{code}>" for letter, code in zip("abc", codes)] for item, codes in zip(IDS, CODES.tolist())
    }
    items = json.loads((out / "Ads.item.json").read_text())
    assert [items[number[item]]["title"] for item in IDS] == ["red shoe", "blue shoe", "lamp for home", "dog", "Käse"]
    assert items[number["ant"]]["description"].startswith("Description: ['")  # not evaluated by their reader
    assert items[number["cat"]]["description"] == "lamp for home" and all(items[row]["description"] for row in items)
    catalog = read_catalog(CatalogConfig(items=tmp_path / "items.parquet", sequences=tmp_path / "sequences.parquet"))
    split = split_histories(catalog, CatalogConfig(items=tmp_path / "items.parquet").split)
    for part in ("valid", "test"):
        header, *lines = (out / f"Ads.{part}.inter").read_text().splitlines()
        assert header == "user_id:token\titem_id_list:token_seq\titem_id:token"
        for line in lines:
            user, history, target = line.split("\t")
            expected = split.history(int(user), part).tolist()
            assert (
                list(map(int, history.split())) == expected and int(target) == (split.valid if part == "valid" else split.test)[int(user)]
            )
    train = [line.split("\t") for line in (out / "Ads.train.inter").read_text().splitlines()[1:]]
    assert len(train) == sum(max(len(rows) - 1, 0) for rows in split.train) > 0
    assert all(len(history.split()) >= 1 for _, history, _ in train)


def test_mistakes_are_named(tmp_path, language_model, capsys):
    folder = sid_folder(tmp_path / "sids")
    for arguments, message in (
        (["--format", "huggingface"], "name one with --tokenizer or --model"),
        (["--format", "minionerec"], "name a configuration with --config"),
        (["--format", "onnx"], "known: flashrec, nvidia, minionerec, huggingface"),
        (["--format", "nvidia", "--tokenizer", str(tmp_path)], "no Hugging Face text tokenizer can be loaded"),
        (["--format", "nvidia", "--config", str(shop(tmp_path))], "nvidia reads no catalogue"),
        (["--format", "minionerec", "--config", str(shop(tmp_path)), "--name", "a.b"], "cuts file names at the first dot"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(folder), *arguments, "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err, arguments
    short = sid_folder(tmp_path / "short", codes=CODES[:, :2], sizes=(3, 2))
    config = CatalogConfig(items=tmp_path / "items.parquet", sequences=tmp_path / "sequences.parquet")
    with pytest.raises(ArtifactError, match="2 levels, MiniOneRec skips items with fewer than 3"):
        export_sids(short, tmp_path / "out", "minionerec", catalog=config)
    with pytest.raises(ConfigError, match="leave --model and --tokenizer out"):
        export_sids(folder, tmp_path / "out", "minionerec", catalog=config, model=language_model)
    export_sids(folder, tmp_path / "out", "nvidia")
    with pytest.raises(ArtifactError, match="finished already; remove it or run `mmsid export --redo`"):
        export_sids(folder, tmp_path / "out", "nvidia")
    main(["export", str(folder), "--format", "nvidia", "--out", str(tmp_path / "out"), "--redo"])
