"""Vector backbone: its content is the normalised vectors, its untrained states are the content, and a tokenizer trains on vectors alone."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmsid.backbone.vectors import VectorBackbone
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.errors import CatalogError, ConfigError
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.assign import AssignConfig
from mmsid.tokenizer.inputs import ItemInput, build_inputs
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.train_config import TrainTokenizerConfig


def item(*vectors) -> ItemInput:
    return ItemInput("", vectors=tuple(np.array(vector, np.float32) for vector in vectors))


def test_content_is_the_concatenation_of_unit_vectors_and_untrained_states_equal_it():
    backbone = VectorBackbone((2, 1), num_levels=3, rank=4)
    found = backbone.read(backbone.collate([item([3, 4], [-7]), item([0, 0], [2]), ItemInput("")]))
    half = 0.5**0.5
    expected = torch.tensor([[0.6 * half, 0.8 * half, -half], [0, 0, half], [0, 0, 0]])
    assert torch.allclose(found.pooled, expected) and torch.equal(found.states, found.pooled[:, None].expand(-1, 4, -1))


def test_every_token_can_learn_states_of_its_own():
    backbone = VectorBackbone((2,), num_levels=1, rank=2)
    states = backbone(backbone.collate([item([1, 0]), item([0, 1])]))
    states[0, 0].sum().backward()
    assert backbone.queries.grad[0].abs().sum() > 0 and backbone.up.grad[0].abs().sum() > 0
    assert backbone.queries.grad[1].abs().sum() == 0 and backbone.up.grad[1].abs().sum() == 0
    assert VectorBackbone((2,), num_levels=1, rank=0)(backbone.collate([item([1, 0])])).shape == (1, 2, 2)


def test_vectors_of_other_families_are_refused():
    backbone = VectorBackbone((2, 1), num_levels=1)
    for wrong in (item([1, 2, 3]), item([1], [1, 2])):
        with pytest.raises(CatalogError, match=r"the tokenizer reads 2 \+ 1"):
            backbone.collate([wrong])


def write_catalog(folder, items: int = 48, users: int = 30, seed: int = 0, **more) -> CatalogConfig:
    """Items without any text, with vectors of two families around four centres, and events of users who like one centre."""
    rng = np.random.default_rng(seed)
    ids = [f"ad{n}" for n in range(items)]
    pq.write_table(pa.table({"item_id": ids}), folder / "items.parquet")
    for name, width in (("content", 6), ("graph", 4)):
        centres = 2 * rng.normal(size=(4, width))
        values = centres[np.arange(items) % 4] + 0.3 * rng.normal(size=(items, width))
        pq.write_table(pa.table({"item_id": ids, "vector": list(values.astype(np.float32))}), folder / f"{name}.parquet")
    rows = []
    for user in range(users):
        for time, at in enumerate(rng.choice(items // 4, size=8, replace=False)):
            kind = ["click", "click", "conversion", "exposure"][int(rng.integers(4))]
            rows.append({"user_id": f"u{user}", "item_id": ids[4 * at + user % 4], "timestamp": time, "event_type": kind})
    pq.write_table(pa.Table.from_pylist(rows), folder / "events.parquet")
    types = {"click": 1.0, "conversion": 2.5, "exposure": 0.0}
    files = {"items": folder / "items.parquet", "events": folder / "events.parquet"}
    return CatalogConfig(**files, event_types=types, vectors=[folder / "content.parquet", folder / "graph.parquet"], **more)


SMALL = {"codebook_size": 8, "num_levels": 2, "batch_size": 8, "backbone": {"kind": "vectors"}}


def test_vectors_are_content_so_that_shuffled_rows_and_ids_change_nothing(tmp_path):
    catalog = read_catalog(write_catalog(tmp_path))
    assert len({item.content_sha256 for item in catalog.items}) == 48 and catalog.vectors.widths == (6, 4)
    order = np.random.default_rng(1).permutation(48)
    for name in ("items", "content", "graph", "events"):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        rows = order if name != "events" else np.random.default_rng(2).permutation(len(table))
        pq.write_table(table.take(rows), tmp_path / f"{name}.parquet")
    again = read_catalog(CatalogConfig.model_validate(write_config(tmp_path)))
    assert again.sha256 == catalog.sha256 and np.array_equal(again.vectors.values, catalog.vectors.values)
    one = build_inputs(again)[again.row_of["ad7"]]
    table = {name: pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("content", "graph")}
    expected = [next(row["vector"] for row in table[name] if row["item_id"] == "ad7") for name in ("content", "graph")]
    assert one.text == "" and [vector.tolist() for vector in one.vectors] == expected


def write_config(folder) -> dict:
    return {
        "items": folder / "items.parquet",
        "events": folder / "events.parquet",
        "event_types": {"click": 1.0, "conversion": 2.5, "exposure": 0.0},
        "vectors": [folder / "content.parquet", folder / "graph.parquet"],
    }


def test_items_without_a_vector_and_vectors_without_an_item_are_counted(tmp_path):
    config = write_catalog(tmp_path)
    for name in ("content", "graph"):
        table = pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
        table[0]["item_id"] = "stranger"
        pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{name}.parquet")
    catalog = read_catalog(config)
    assert catalog.problems["no_vector"] == 1 and catalog.problems["vector_of_unknown_item"] == 2
    assert catalog.items[catalog.row_of["ad0"]].problems == ("no_vector",)


def test_a_tokenizer_trains_assigns_and_encodes_vectors_alone(tmp_path):
    config = write_catalog(tmp_path)
    out = train.run(TrainTokenizerConfig(out=tmp_path / "tokenizer", catalog=config, steps=3, **SMALL))
    tokenizer = ItemTokenizer.from_pretrained(out)
    assert tokenizer.settings.use == ("vectors",) and tokenizer.settings.backbone.widths == (6, 4)
    assert "vectors of dimension 6 + 4" in tokenizer.describe()
    assert tokenizer.backbone.queries.abs().sum() > 0 and tokenizer.backbone.up.abs().sum() > 0  # the token parts were trained
    table = SidTable.load(assign.run(AssignConfig(out=tmp_path / "sids", catalog=config, tokenizer=out)))
    groups = [{tuple(table.codes[table.item_ids.index(f"ad{n}")][:1]) for n in range(centre, 48, 4)} for centre in range(4)]
    assert sum(map(len, groups)) <= 12  # of 48 if codes ignored the vectors; items of one centre share first codes
    catalog = read_catalog(config)
    record = {"vectors": [vector.tolist() for vector in build_inputs(catalog)[0].vectors]}
    assert torch.equal(tokenizer.encode([record]).raw_codes, tokenizer.encode(build_inputs(catalog)[:1]).raw_codes)
    with pytest.raises(CatalogError, match="item 0 has no vectors"):
        tokenizer.encode([{"title": "red shoe"}])
    with pytest.raises(CatalogError, match="expected a list of finite numbers"):
        tokenizer.encode([{"vectors": [1.0, float("nan")]}])
    swapped = config.model_copy(update={"vectors": config.vectors[::-1]})
    with pytest.raises(CatalogError, match=r"dimension 4 \+ 6, but the tokenizer reads 6 \+ 4"):
        assign.run(AssignConfig(out=tmp_path / "other", catalog=swapped, tokenizer=out))


def test_a_vector_backbone_without_vectors_is_refused_before_training(tmp_path):
    config = write_catalog(tmp_path).model_copy(update={"vectors": ()})
    rows = pq.read_table(config.items)
    pq.write_table(rows.append_column("title", pa.array(["a text"] * rows.num_rows)), config.items)
    with pytest.raises(ConfigError, match=r"catalog\.vectors names no file"):
        train.run(TrainTokenizerConfig(out=tmp_path / "a", catalog=config, **SMALL))
    with pytest.raises(ConfigError, match="reads vectors"):
        train.run(TrainTokenizerConfig(out=tmp_path / "b", catalog=write_catalog(tmp_path), use=("title",), **SMALL))
