"""Exports read by the code of their consumers, from checkouts that environment variables name. No code of theirs is in this repository.

MMSID_FLASHREC: folder that holds the package `flashrec` (an unpacked wheel, or a checkout).
MMSID_NVIDIA_SID_GR: `examples/sid-gr-inference` of github.com/NVIDIA/recsys-examples.
MMSID_MINIONEREC: checkout of github.com/AkaliKong/MiniOneRec. Its readers need pandas.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from export_parts import CODES, IDS, shop, sid_folder, tiny_language_model

from mmsid.catalog.config import CatalogConfig
from mmsid.export.export import export_sids
from mmsid.sids.table import SidTable

PATHS = [tuple(codes) for codes in CODES.tolist()]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return tiny_language_model(tmp_path_factory.mktemp("lm"))


def checkout(variable: str, file: str) -> Path:
    """Folder named by the variable, or a skip with the reason."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: name a checkout of the consumer to run its own reader")
    assert (Path(folder) / file).is_file(), f"{variable}={folder} has no {file}"
    return Path(folder)


def imported(path: Path, name: str):
    """A module loaded from one file, without the package that it is part of."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_flashrec_builds_its_trie_from_the_vocabulary(tmp_path, language_model, monkeypatch):
    folder = checkout("MMSID_FLASHREC", "flashrec/search/trie.py")
    monkeypatch.syspath_prepend(str(folder))
    from flashrec.config import BeamRecConfig, parse_sid_spec
    from flashrec.sid_layout import infer_sid_layout

    trie = imported(folder / "flashrec" / "search" / "trie.py", "flashrec_search_trie")
    out = export_sids(sid_folder(tmp_path / "sids"), tmp_path / "out", "flashrec", model=language_model)
    spec = json.loads((out / "manifest.json").read_text())["extra"]["sid"]
    layout = infer_sid_layout(str(out), str(out / "sid_vocab.json"))  # reads the tokenizer and the first key
    assert parse_sid_spec(spec) == (layout.token_range, layout.codebook_sizes, layout.boundary_tokens)
    config = BeamRecConfig(model_path=str(out), sid=spec, sid_vocab_file=str(out / "sid_vocab.json"))
    built = trie.build_beam_valid_path(
        sid_file=config.sid_vocab_file, codebook_sizes=config.parsed_codebook_sizes(), special_token_ids=config.parsed_sid_token_ids()
    )
    assert built.mode == "trie" and built.max_depth == 3
    first = config.parsed_sid_token_ids()[0]
    starts = (first, first + 3, first + 5)
    paths = {tuple(start + code for start, code in zip(starts, path)) for path in PATHS}
    found = {(a, b, c) for a in built.allowed_next(()) for b in built.allowed_next((a,)) for c in built.allowed_next((a, b))}
    assert found == paths


def test_flashrec_reads_four_levels_with_the_printed_layout(tmp_path, language_model, monkeypatch):
    import numpy as np

    folder = checkout("MMSID_FLASHREC", "flashrec/search/trie.py")
    monkeypatch.syspath_prepend(str(folder))
    from flashrec.config import BeamRecConfig

    trie = imported(folder / "flashrec" / "search" / "trie.py", "flashrec_search_trie")
    sids = sid_folder(tmp_path / "sids", suffix=np.array([0, 1, -1, -1, -1]))
    out = export_sids(sids, tmp_path / "out", "flashrec", model=language_model)
    spec = json.loads((out / "manifest.json").read_text())["extra"]["sid"]
    config = BeamRecConfig(model_path=str(out), sid=spec, sid_vocab_file=str(out / "sid_vocab.json"))
    sizes = config.parsed_codebook_sizes()
    first = config.parsed_sid_token_ids()[0]
    assert sizes == [3, 2, 4, 3] and config.parsed_boundary_token_ids() == [first + 12, first + 13]
    built = trie.build_beam_valid_path(
        sid_file=config.sid_vocab_file, codebook_sizes=sizes, special_token_ids=config.parsed_sid_token_ids()
    )
    assert built.max_depth == 4 and built.allowed_next((first, first + 4, first + 7)) == {first + 9, first + 10}


def test_nvidia_catalogue_resolves_every_path_to_its_items(tmp_path, language_model):
    folder = checkout("MMSID_NVIDIA_SID_GR", "src/gr_inference/gr_runtime/item_constraints.py")
    for name in ("gr_inference", "gr_inference.gr_runtime"):  # the package imports CUDA kernels; this file needs a name of a type only
        sys.modules.setdefault(name, types.ModuleType(name))
    generation = types.ModuleType("gr_inference.gr_runtime.generation")
    generation.GRGenerationState = object
    sys.modules.setdefault("gr_inference.gr_runtime.generation", generation)
    theirs = imported(folder / "src/gr_inference/gr_runtime/item_constraints.py", "gr_inference.gr_runtime.item_constraints")
    out = export_sids(sid_folder(tmp_path / "sids"), tmp_path / "out", "nvidia", tokenizer=language_model)
    from transformers import AutoTokenizer

    text_tokenizer = AutoTokenizer.from_pretrained(out)
    catalog = theirs.SemanticItemCatalog.from_jsonl(out / "items.jsonl", vocab_size=len(text_tokenizer))
    provider = catalog.provider(vocab_size=len(text_tokenizer), eos_token_id=text_tokenizer.eos_token_id)
    table = SidTable.load(tmp_path / "sids")
    for item in IDS:
        ids = text_tokenizer.convert_tokens_to_ids(list(table.sid(item)))
        assert provider.is_complete(ids) and provider.allowed_next(ids) == {text_tokenizer.eos_token_id}
        (resolved,) = provider.resolve_item_ids(ids)
        (record,) = [one for one in catalog.items if one.item_id == resolved]
        assert item in (resolved, *record.metadata.get("item_ids", ()))
    assert catalog.item_count == 4


MINIONEREC = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
for name in ("fire", "bitsandbytes"):
    sys.modules.setdefault(name, types.ModuleType(name))
from data import RLTitle2SidDataset, SidItemFeatDataset, SidSFTDataset
from transformers import AutoTokenizer
import ast, pathlib
source = pathlib.Path(sys.argv[1], "sft.py").read_text()
extender = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "TokenExtender")
scope = {"os": __import__("os"), "json": json}
exec(compile(ast.Module([extender], []), "sft.py", "exec"), scope)
folder, name, text_tokenizer, converted = sys.argv[2:6]
files = dict(item_file=f"{folder}/{name}.item.json", index_file=f"{folder}/{name}.index.json")
tokenizer = AutoTokenizer.from_pretrained(text_tokenizer)
new = scope["TokenExtender"](folder, name).get_new_tokens()
tokenizer.add_tokens(new)
features = SidItemFeatDataset(**files, tokenizer=tokenizer)
reinforced = RLTitle2SidDataset(**files)
sequences = SidSFTDataset(train_file=f"{converted}/train/{name}_5_2016-10-2018-11.csv", tokenizer=tokenizer)
info = open(f"{converted}/info/{name}_5_2016-10-2018-11.txt").read().splitlines()
print(json.dumps({"new": new, "sid2title": features.sid2title, "samples": len(features), "described": reinforced.description2sid,
                  "sequences": len(sequences), "info": [line.split("\\t") for line in info]}))
"""


def test_minionerec_converts_and_loads_the_data_set(tmp_path, language_model):
    folder = checkout("MMSID_MINIONEREC", "data.py")
    pytest.importorskip("pandas", reason="MiniOneRec reads csv with pandas")
    shop(tmp_path)
    codes = CODES.copy()
    codes[1, 2] = 3  # titles of items that share a SID would overwrite each other in their mapping
    config = CatalogConfig(items=tmp_path / "items.parquet", sequences=tmp_path / "sequences.parquet", fields={"sequence": "items"})
    out = export_sids(sid_folder(tmp_path / "sids", codes=codes), tmp_path / "Ads", "minionerec", catalog=config)
    convert = [sys.executable, str(folder / "convert_dataset.py"), "--data_dir", str(out), "--dataset_name", "Ads"]
    subprocess.run([*convert, "--output_dir", str(tmp_path / "converted")], check=True, capture_output=True, text=True)
    script = [sys.executable, "-c", MINIONEREC, str(folder), str(out), "Ads", str(language_model), str(tmp_path / "converted")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    table = SidTable.load(tmp_path / "sids")
    titles = {"ant": "red shoe", "bee": "blue shoe", "cat": "lamp for home", "dog": "dog", "eel": "Käse"}
    assert found["sid2title"] == {"".join(table.sid(item)): title for item, title in titles.items()}
    assert found["samples"] == 10 and set(found["new"]) == {text for item in IDS for text in table.sid(item)}
    assert {tuple(row[:2]) for row in found["info"]} == {("".join(table.sid(item)), title) for item, title in titles.items()}
    assert any(text.startswith("Description: ['__import__") for text in found["described"]) and found["sequences"] > 0
