"""The configurations of docs/catalogues.md run through the command line: typed events, and vectors with events but no text or picture."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mmsid.artifacts import read_json, read_manifest, read_table
from mmsid.catalog import Catalog
from mmsid.cli import main
from mmsid.sids import SidTable

PAGE = (Path(__file__).parents[1] / "docs" / "catalogues.md").read_text(encoding="utf-8")
CONFIGS = {yaml.safe_load(block)["name"]: block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)}
SMALL = [
    "train_tokenizer.steps=2",
    "train_tokenizer.batch_size=8",
    "train_tokenizer.codebook_size=8",
    "train_tokenizer.num_levels=2",
    "train_tokenizer.start={behaviour_dim: 8}",
    "train_tokenizer.weights={reconstruction: 0}",
    "baselines.codebook_size=8",
    "baselines.num_levels=2",
    "baselines.start={behaviour_dim: 8}",
    "train_recommender.schedule={epochs: 1}",
    "train_recommender.model={d_model: 16, layers: 1, heads: 2, hidden: 16}",
]


def write_data(folder: Path, items: int = 40, users: int = 36) -> None:
    """Ads of four groups with title and vectors, and clicks, conversions and exposures of users who like one group each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    ids = [f"ad{n}" for n in range(items)]
    things = ["red shoe", "green tea", "blue lamp", "oak chair"]
    pq.write_table(pa.table({"item_id": ids, "title": [f"{things[n % 4]} {n}" for n in range(items)]}), folder / "items.parquet")
    pq.write_table(pa.table({"item_id": ids}), folder / "ids.parquet")
    for name, width in (("content", 6), ("graph", 4)):
        values = rng.normal(size=(4, width))[np.arange(items) % 4] + 0.2 * rng.normal(size=(items, width))
        pq.write_table(pa.table({"item_id": ids, "vector": list(values)}), folder / f"{name}.parquet")
    rows = []
    for user in range(users):
        kinds = rng.choice(["click", "conversion", "exposure"], 8, p=[0.6, 0.3, 0.1]).tolist()
        liked = [ids[4 * int(at) + user % 4] for at in rng.permutation(items // 4)[:8]]
        rows += [
            {"user_id": f"u{user}", "item_id": item, "timestamp": time, "event_type": kind}
            for time, (item, kind) in enumerate(zip(liked, kinds, strict=True))
        ]
    pq.write_table(pa.Table.from_pylist([rows[at] for at in rng.permutation(len(rows))]), folder / "events.parquet")


@pytest.mark.parametrize("name", ["typed_events", "own_vectors"])
def test_the_configuration_runs_from_the_command_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    (tmp_path / "mine.yaml").write_text(CONFIGS[name], encoding="utf-8")
    main(["run", "mine.yaml", *SMALL])
    run = tmp_path / "runs" / name
    table = SidTable.load(run / "assign")
    assert len(table) == 40 and len(np.unique(table.full_codes(), axis=0)) == 40
    shares = [len({table.codes[table.item_ids.index(f"ad{n}"), 0] for n in range(group, 40, 4)}) for group in range(4)]
    assert sum(shares) <= 16  # the first codes of four groups of ten ads: at most 40, and 8 if content decides alone
    ranks = read_table(run / "train_recommender" / "ranks" / "ours" / "0.parquet")
    assert set(ranks["weight"].to_pylist()) == {1.0, 2.5}
    rows = read_json(run / "train_recommender" / "metrics.json")["arms"]
    for row in rows:
        metrics = row["metrics"]
        test = ranks.filter(pa.compute.equal(ranks["part"], "test")) if row["arm"] == "ours" else None
        assert 0 <= metrics["weighted HR@10"]["mean"] <= 1
        if test is not None:
            hit, weight = test["above"].to_numpy() < 10, test["weight"].to_numpy()
            assert metrics["weighted HR@10"]["mean"] == pytest.approx((hit * weight).sum() / weight.sum())
    assert "| weighted HR@10 | weighted NDCG@10 |" in (run / "train_recommender" / "ranking.md").read_text()
    inputs = set(read_manifest(run / "ingest")["inputs"])
    assert inputs == {"items", "events"} | ({"vectors 1", "vectors 2"} if name == "own_vectors" else set())
    assert set(read_manifest(run / "train_tokenizer")["inputs"]) == {"catalog"}


def test_the_configuration_with_fields_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = ["sku,brand,name,photo,more_photos,department,colour,price"]
    for number in range(12):
        names = [f"{number}_{place}.png" for place in range(3)]
        for name in names:
            Image.new("RGB", (6, 6), (20 * number, 0, 0)).save(tmp_path / "data" / name)
        rows.append(f"s{number},acme,shirt {number},{names[0]},{'|'.join(names[1:])},Apparel > Shirts {number % 3},red,{number}.99")
    (tmp_path / "data" / "products.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "mine.yaml").write_text(CONFIGS["shop"], encoding="utf-8")
    main(["catalog", "--config", "mine.yaml"])
    out = capsys.readouterr().out
    assert "items         12 (12 with distinct content)" in out and "36 pictures" in out and "distinct per depth: 1, 3" in out
    assert "attributes    brand, colour" in out and "not read      price" in out
    item = next(item for item in Catalog.read("runs/shop/ingest").items if item.item_id == "s4")
    assert item.title == "acme shirt 4" and len(item.images) == 3
