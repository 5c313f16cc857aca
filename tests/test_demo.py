"""`mmsid demo`: known and new ads, and the whole story in an empty folder."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmsid.artifacts import read_manifest
from mmsid.catalog.demo import write_demo_catalog
from mmsid.catalog.demo.ads import plan_ads
from mmsid.catalog.demo.new_ads import new_ads, write_new_ads
from mmsid.config import load_yaml
from mmsid.demo.facts import wilson
from mmsid.errors import ArtifactError, ConfigError
from mmsid.sids import SidTable

ROOT = Path(__file__).parents[1]
SMALL = [
    "train_tokenizer.steps=2",
    "train_tokenizer.decoder_steps=2",
    "train_tokenizer.codebook_size=16",
    "baselines.codebook_size=16",
    "refine.top_m=3",
    "refine.loop.rounds=2",
    "refine.gate.draws=50",
    "train_recommender.schedule.epochs=1",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A demo catalogue, and its known part."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo_catalog(folder / "catalog", items=80, users=40, seed=3)
    return folder / "catalog", write_new_ads(folder / "catalog", folder / "known")


def test_nothing_of_a_new_ad_is_left_in_the_known_part(parts):
    catalog, known = parts
    items, left = (pq.read_table(folder / "items.parquet") for folder in parts)
    new = set(items["item_id"].to_pylist()) - set(left["item_id"].to_pylist())
    assert len(left) + len(new) == 80 and 5 <= len(new) <= 12 and left.schema.equals(items.schema)
    assert read_manifest(known, "demo_new_ads")["counts"] == {"items": 80, "known": 80 - len(new), "new": len(new), "users": 40}
    users = {row["user_id"]: row for row in pq.read_table(catalog / "sequences.parquet").to_pylist()}
    histories = pq.read_table(known / "sequences.parquet").to_pylist()
    assert [row["user_id"] for row in histories] == list(users)
    for row in histories:
        whole = users[row["user_id"]]
        expected = [pair for pair in zip(whole["items"], whole["timestamps"], strict=True) if pair[0] not in new]
        assert list(zip(row["items"], row["timestamps"], strict=True)) == expected
    for request, target in zip(*(pq.read_table(known / f"{name}.parquet").to_pylist() for name in ("requests", "next_items")), strict=True):
        whole = users[request["user_id"]]["items"]
        assert request["items"] == whole[:-1] and target["item_id"] == whole[-1] and target["is_new"] == (whole[-1] in new)


def test_an_exact_duplicate_is_where_its_original_is():
    ads = plan_ads(1200, seed=0)
    new = dict(zip([ad.item_id for ad in ads], new_ads(ads, 0, 0.3), strict=True))
    pairs = [(ad.item_id, ad.duplicate_of) for ad in ads if ad.duplicate_of]
    assert len({new[original] for _, original in pairs}) == 2 and all(new[item] == new[original] for item, original in pairs)


def test_without_new_ads_the_best_achievable_ranking_is_that_of_the_catalogue(parts, tmp_path):
    catalog, known = parts
    everything = json.loads((write_new_ads(catalog, tmp_path / "all", share=0.0) / "best_achievable.json").read_text())
    drawn = json.loads((catalog / "best_achievable.json").read_text())
    assert everything == {part: drawn[part] for part in ("valid", "test")}
    best = json.loads((known / "best_achievable.json").read_text())["test"]
    assert best["expected"]["HR@10"] >= drawn["test"]["expected"]["HR@10"] - 0.02  # fewer items are easier to rank
    assert abs(best["expected"]["HR@50"] - best["realised"]["HR@50"]) < 4 * best["standard_error"]["HR@50"] + 0.05


def test_only_a_drawn_catalogue_is_divided(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        write_new_ads(tmp_path / "none", tmp_path / "known")


def test_wilson_interval_by_hand():
    assert np.allclose(wilson(0, 10), (0.0, 0.27755), atol=1e-4)  # Brown, Cai and DasGupta 2001, table of intervals at n = 10
    assert np.allclose(wilson(5, 10), (0.23659, 0.76341), atol=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_shipped_configuration_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_yaml("configs/demo.yaml")["name"] == "demo"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text("name: mine\ncatalog: {items: a.csv}\n")
    assert load_yaml("configs/demo.yaml")["name"] == "mine"
    for path in ("configs/none.yaml", "demo.yaml", "configs/../pyproject.toml"):
        with pytest.raises(ConfigError, match="does not exist"):
            load_yaml(path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel, as an installation outside of the checkout has it."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder / "wheels"), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *wheel], check=True, capture_output=True)
    (found,) = (folder / "wheels").glob("mmsid-*.whl")
    zipfile.ZipFile(found).extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_demo_tells_its_story_in_an_empty_folder(installed, tmp_path):
    command = [sys.executable, "-m", "mmsid.cli", "demo", "--items", "160", "--users", "120"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([*command, *SMALL], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chapters = re.findall(r"^(\d)/6  ", done.stdout, re.M)
    assert chapters == list("123456")
    text, page = ((tmp_path / "demo" / name).read_text() for name in ("story.md", "story.html"))
    assert text.strip() in done.stdout and "nan" not in text and "None" not in text
    grown, first = SidTable.load(tmp_path / "runs/demo_new_ads/assign"), SidTable.load(tmp_path / "runs/demo/refine/sids")
    new = set(grown.item_ids) - set(first.item_ids)
    assert len(grown) == 160 and f"{len(new)} ads got Semantic IDs" in text and "; 0 published codes moved" in text
    names = set(re.findall(r"^\| ([^|]+) \| \.?\d", text, re.M))
    assert {"clustering of content and behaviour", "content alone", "hybrid recommender", "best achievable"} <= names
    accepted = "accepted the refined codes" in text
    assert ("refined on the logs" in names) == accepted and accepted != ("refused the refined codes" in text)
    assert page.count('<img class="picture"') >= 3 and "<script" not in page and 'href="../runs/demo/report/report.html"' in page
    again = subprocess.run([*command, *SMALL], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("finished earlier, kept") >= 9 and text.strip() in again.stdout
    other = subprocess.run([*command[:-1], "100", *SMALL], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert other.returncode == 1 and "drawn with 120 users, not 100" in other.stderr
    script = (
        "import mmsid\n"
        f"assert mmsid.__file__.startswith({str(installed)!r})\n"
        "folder = mmsid.bundle('runs/demo/bundle', run='runs/demo')\n"
        "bundle = mmsid.load_bundle(folder)\n"
        "found = bundle.tokenizer.encode([{'title': 'Summer sandals', 'caption': 'a blue sandal by Velo'}])\n"
        "assert len(bundle.neighbours(found.embedding, k=3)[0]) == 3\n"
        "recommender = mmsid.Recommender.from_pretrained('runs/demo/train_recommender/recommender')\n"
        "best = recommender.recommend([recommender.item_ids[:3], []], k=5)\n"
        "assert [len(items) for items in best.item_ids] == [5, 5] and best.status == ['personal', 'empty_history']\n"
    )
    used = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
