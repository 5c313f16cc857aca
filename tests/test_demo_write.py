"""Written demo catalogue: files, determinism, duplicates, README."""

import json
from pathlib import Path

import pytest

from mmsid.artifacts import read_json, read_manifest, read_table
from mmsid.catalog.demo import write_demo_catalog
from mmsid.catalog.demo.ads import draw_creatives, plan_ads
from mmsid.errors import ArtifactError, ConfigError


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> Path:
    return write_demo_catalog(tmp_path_factory.mktemp("demo") / "catalog", items=150, users=60, seed=1)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_command_writes_the_same_bytes_whatever_the_worker_count(catalog, tmp_path, workers):
    again = write_demo_catalog(tmp_path / "catalog", items=150, users=60, seed=1, workers=workers)
    assert _bytes(again) == _bytes(catalog)


def test_a_picture_does_not_depend_on_which_ads_are_drawn_before_it(catalog):
    ads = plan_ads(150, seed=1)
    for ad in (ads[97], ads[3]):
        for creative in draw_creatives(ad, seed=1):
            assert (catalog / "images" / creative.name).read_bytes() == creative.jpeg


def test_another_seed_writes_other_ads(catalog, tmp_path):
    other = read_table(write_demo_catalog(tmp_path / "other", items=10, users=0, seed=2) / "items.parquet")
    assert not set(other["item_id"].to_pylist()) & set(read_table(catalog / "items.parquet")["item_id"].to_pylist())


def test_files_agree_with_each_other(catalog):
    items, truth = read_table(catalog / "items.parquet").to_pylist(), read_table(catalog / "truth.parquet").to_pylist()
    assert [row["item_id"] for row in items] == [row["item_id"] for row in truth] == sorted(row["item_id"] for row in items)
    for row, true in zip(items, truth, strict=True):
        assert all((catalog / name).is_file() for name in row["image"])
        assert len(json.loads(true["boxes"])) == len(row["image"])
        assert row["categories"][-1] == true["product"]
        assert row["attributes"] == {name: true[name] for name in ("material", "season", "collection")}
    assert {len(row["image"]) for row in items} == {1, 2}
    pictures = sum(len(row["image"]) for row in items)
    assert read_manifest(catalog, "demo_catalog")["counts"] == {"items": 150, "pictures": pictures, "users": 60}
    ids = {row["item_id"] for row in items}
    for user in read_table(catalog / "sequences.parquet").to_pylist():
        assert set(user["items"]) <= ids and len(set(user["items"])) == len(user["items"]) == len(user["timestamps"])
        assert user["timestamps"] == sorted(user["timestamps"])


def test_a_duplicate_shares_everything_but_its_id(catalog):
    items = {row["item_id"]: row for row in read_table(catalog / "items.parquet").to_pylist()}
    copies = [row for row in read_table(catalog / "truth.parquet").to_pylist() if row["duplicate_of"]]
    assert copies
    for row in copies:
        copy, original = items[row["item_id"]], items[row["duplicate_of"]]
        assert {**copy, "item_id": 0, "image": 0} == {**original, "item_id": 0, "image": 0}
        for name, source in zip(copy["image"], original["image"], strict=True):
            assert (catalog / name).read_bytes() == (catalog / source).read_bytes()


def test_readme_contains_the_best_achievable_figures_and_the_picture_facts(catalog):
    text = (catalog / "README.md").read_text()
    best = read_json(catalog / "best_achievable.json")
    assert f"{best['test']['expected']['HR@10']:.4f}" in text
    assert "| colour | 8 | **only here** | - | - |" in text and "| material | 6 | - | **only here** | - |" in text


def test_a_catalogue_of_one_item_without_users_has_no_sequences(tmp_path):
    out = write_demo_catalog(tmp_path / "small", items=1, users=0, seed=0)
    names = ["README.md", "SHA256SUMS", "images", "items.parquet", "manifest.json", "truth.parquet"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert "The users" not in (out / "README.md").read_text()


@pytest.mark.parametrize(("items", "users"), [(0, 0), (10, -1), (10, 5)])
def test_impossible_sizes_are_refused_with_a_remedy(items, users, tmp_path):
    with pytest.raises(ConfigError, match="give"):
        write_demo_catalog(tmp_path / "x", items=items, users=users, seed=0)
    assert not (tmp_path / "x").exists()


def test_a_finished_catalogue_is_not_overwritten(catalog):
    with pytest.raises(ArtifactError, match="finished already"):
        write_demo_catalog(catalog, items=5, users=0, seed=0)
