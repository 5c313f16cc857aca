"""Stage `ingest`: sources are read once, later stages open the result, and changes of the sources are noticed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from drawn_shop import FileServer
from PIL import Image

import mmsid
from mmsid.artifacts import MANIFEST, read_json, read_manifest, read_table
from mmsid.catalog import Catalog, CatalogConfig, read_catalog
from mmsid.cli import main
from mmsid.errors import CatalogError

COLUMNS = ["item_id", "title", "image", "brand"]


def write(folder: Path, items: int = 12, pictures: bool = True, users: int = 6) -> dict:
    """A catalogue of two pictures per item, of which every third is missing, and the keys that read it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(items):
        names = [f"{number}_{side}.png" for side in "ab"] if pictures else []
        for side, name in enumerate(names):
            if (2 * number + side) % 3:
                Image.new("RGB", (8 + number % 5, 8), (number % 256, side * 100, 7)).save(folder / name)
        rows.append({"item_id": f"i{number}", "title": f"thing number {number // 2}", "image": names, "brand": "acme"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    histories = [[f"i{(user + step) % items}" for step in range(4)] for user in range(users)]
    pq.write_table(pa.table({"user_id": [f"u{user}" for user in range(users)], "items": histories}), folder / "sequences.parquet")
    return {"items": str(folder / "items.parquet"), "sequences": str(folder / "sequences.parquet")}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST
    }


def stamp(folder: Path) -> int:
    return (folder / MANIFEST).stat().st_mtime_ns


def test_an_ingested_catalogue_equals_the_sources(tmp_path):
    source = write(tmp_path / "shop")
    folder = mmsid.ingest(tmp_path / "ingest", source)
    direct, ingested = read_catalog(CatalogConfig(**source)), Catalog.read(folder)
    assert ingested.items == direct.items and ingested.item_ids == direct.item_ids and len(direct.items) == 12
    assert [user.rows.tolist() for user in ingested.histories] == [user.rows.tolist() for user in direct.histories]
    assert (ingested.sha256, ingested.problems) == (direct.sha256, direct.problems)
    assert all(path.is_file() for item in ingested.items for path in item.images)
    manifest = read_manifest(folder, "ingest")
    assert {name: manifest["counts"][name] for name in ("in", "ok", "quarantined")} == {"in": 12, "ok": 12, "quarantined": 0}
    assert manifest["extra"]["not_read"] == ["brand"]


def test_later_stages_read_the_sources_no_more(tmp_path):
    source = write(tmp_path / "shop")
    config = CatalogConfig(**source, ingested=mmsid.ingest(tmp_path / "ingest", source))
    before = read_catalog(config)
    for name in ("items", "sequences"):
        Path(source[name]).unlink()
    assert read_catalog(config).sha256 == before.sha256
    assert not read_catalog(config.without_users()).histories
    assert config.inputs() == {"catalog": config.ingested}
    other = config.model_copy(update={"max_items": 3})  # another catalogue: the folder is of no use for it
    assert other.artefact() is None and "items" in other.inputs()


def test_every_problem_is_recorded_with_its_row_and_file(tmp_path):
    source = write(tmp_path / "shop")
    rows = pq.read_table(source["items"]).to_pylist()
    rows += [{**rows[0], "title": "another text"}, {**rows[1], "item_id": None}]
    pq.write_table(pa.Table.from_pylist(rows), source["items"])
    folder = mmsid.ingest(tmp_path / "ingest", source)
    problems = read_table(folder / "problems.parquet").to_pylist()
    quarantined = {problem["code"]: problem for problem in problems if problem["quarantined"]}
    assert quarantined.keys() == {"duplicate_id", "no_id"} and quarantined["no_id"]["row"] == 14
    assert all(problem["file"] == source["items"] for problem in problems)
    missing = [problem for problem in problems if problem["code"] == "picture_missing"]
    assert len(missing) >= 8 and all(not (tmp_path / "shop" / problem["detail"]).exists() for problem in missing)
    counts = read_manifest(folder)["counts"]
    assert (counts["in"], counts["ok"], counts["quarantined"], counts["items"]) == (14, 12, 2, 12)


def test_an_unchanged_source_is_kept_and_a_changed_one_is_read_again(tmp_path):
    source = write(tmp_path / "shop")
    folder = mmsid.ingest(tmp_path / "ingest", source)
    first = stamp(folder)
    os.utime(source["items"])  # another time, the same bytes
    mmsid.ingest(folder, source)
    assert stamp(folder) == first

    before = Catalog.read(folder).sha256
    Image.new("RGB", (9, 9), "white").save(tmp_path / "shop" / "1_a.png")
    mmsid.ingest(folder, source)
    assert stamp(folder) != first and Catalog.read(folder).sha256 != before, "a picture has changed"

    second, problems = stamp(folder), Catalog.read(folder).problems["picture_missing"]
    Image.new("RGB", (9, 9), "white").save(tmp_path / "shop" / "0_a.png")
    mmsid.ingest(folder, source)
    assert stamp(folder) != second and Catalog.read(folder).problems["picture_missing"] == problems - 1

    pq.write_table(pq.read_table(source["items"]).slice(0, 10), source["items"])
    mmsid.ingest(folder, source)
    assert len(Catalog.read(folder).items) == 10
    assert not list(tmp_path.glob(".ingest*draft")) and not list(tmp_path.glob(".ingest.earlier"))


def test_a_source_that_cannot_be_read_leaves_the_earlier_catalogue(tmp_path):
    source = write(tmp_path / "shop")
    folder = mmsid.ingest(tmp_path / "ingest", source)
    before = files(folder)
    Path(source["items"]).write_bytes(b"PAR1 torn")
    with pytest.raises(CatalogError):
        mmsid.ingest(folder, source)
    assert files(folder) == before


def test_too_many_missing_pictures_stop_the_stage_with_examples_and_the_remedy(tmp_path):
    source = write(tmp_path / "shop")
    for path in (tmp_path / "shop").glob("*.png"):
        path.unlink()
    with pytest.raises(CatalogError, match=r"24 of 24 pictures cannot be used, 24 of them as picture_missing \('.*png', .*image_root"):
        mmsid.ingest(tmp_path / "ingest", source)
    assert len(Catalog.read(mmsid.ingest(tmp_path / "other", source, max_problems=1.0)).items) == 12
    write(tmp_path / "shop")  # the pictures are there now
    assert Catalog.read(mmsid.ingest(tmp_path / "ingest", source)).problems["picture_missing"] == 8


def artefact(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Files of an ingested catalogue, and its items without the times at which pictures were written."""
    found = {name: data for name, data in files(folder).items() if name != "SHA256SUMS"}
    items = pa.ipc.open_file(found.pop("items.arrow")).read_all().to_pylist()
    for item in items:
        item["creatives"] = [{**creative, "mtime_ns": 0} for creative in item["creatives"]]
    return found, items


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["files", "URLs and bytes"])
def test_a_killed_ingest_resumes_to_the_same_files(tmp_path, monkeypatch, remote):
    source = write(tmp_path / "shop", items=60)
    server = FileServer(tmp_path / "shop")
    if remote:  # half of the pictures as URLs, of which some are missing on the server, the others as bytes
        rows = pq.read_table(source["items"]).to_pylist()
        for row in rows:
            url, photo = row.pop("image")
            path = tmp_path / "shop" / photo
            row |= {"image": f"{server.url}/{url}", "photo": path.read_bytes() if path.exists() else None}
        pq.write_table(pa.Table.from_pylist(rows), source["items"])
        source |= {"fields": {"image": ["image", "photo"]}, "pictures": {"allow_private_hosts": True}}
    source["picture_cache"] = str(tmp_path / "pictures")
    script = (
        "import json, os, signal, sys, threading, time\n"
        "import mmsid, mmsid.catalog.ingest.build as build, mmsid.catalog.ingest.stage\n"
        "build._PICTURE_ROWS = 5\n"
        "source, out, delay = sys.argv[1:]\n"
        "threading.Thread(target=lambda: (time.sleep(float(delay)), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()\n"
        "mmsid.ingest(out, json.loads(source))\n"
    )
    import mmsid.catalog.ingest.build as build

    monkeypatch.setattr(build, "_PICTURE_ROWS", 5)
    expected = artefact(mmsid.ingest(tmp_path / "whole", source))
    assert sum(len(item["creatives"]) for item in expected[1]) == 80
    rng = np.random.default_rng(0)
    killed = kept = 0
    for number in range(10):
        out = tmp_path / f"killed{number}"
        shutil.rmtree(tmp_path / "pictures", ignore_errors=True)
        arguments = [sys.executable, "-c", script, json.dumps(source), str(out), f"{rng.uniform(0.0, 0.3):.3f}"]
        child = subprocess.run(arguments, capture_output=True, text=True)
        assert child.returncode in (0, -signal.SIGKILL), child.stderr
        killed += child.returncode != 0
        kept += child.returncode != 0 and any(tmp_path.glob(f".killed{number}*/parts/*.arrow"))
        mmsid.ingest(out, source)
        assert artefact(out) == expected
    server.close()
    assert killed and kept, "some were killed, after parts had been written"


def test_a_table_of_many_chunks_is_ordered_as_a_small_one(tmp_path, monkeypatch):
    """The order of rows and ids in the sources changes nothing, whether the rows fit into one chunk or not."""
    from mmsid.catalog import arrow_files
    from mmsid.catalog.ingest import build

    source = write(tmp_path / "shop", items=90, pictures=False)
    whole = read_catalog(CatalogConfig(**source))
    for module in (arrow_files, build):
        monkeypatch.setattr(module, "CHUNK_ROWS", 8)
    rows = pq.read_table(source["items"]).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[::-1]), source["items"])
    chunked = read_catalog(CatalogConfig(**source))
    assert chunked.items == whole.items and chunked.sha256 == whole.sha256
    assert chunked.items[-1] == list(whole.items)[-1] and chunked.items[3:5] == whole.items[3:5]


def test_creatives_of_one_item_are_merged_over_chunks(tmp_path, monkeypatch):
    from mmsid.catalog import arrow_files
    from mmsid.catalog.ingest import build

    source = write(tmp_path / "shop", items=30)
    rows = pq.read_table(source["items"]).to_pylist()
    rows = [{**row, "item_id": f"g{number % 10}", "colour": f"c{number}"} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), source["items"])
    keys = {"items": source["items"], "fields": {"group_by": "item_id", "attributes": ["colour"]}}
    whole = read_catalog(CatalogConfig(**keys))
    assert len(whole.items) == 10 and len(whole.items[whole.row_of["g1"]].attributes["colour"]) == 3
    for module in (arrow_files, build):
        monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(build, "_PICTURE_ROWS", 4)
    assert read_catalog(CatalogConfig(**keys)).items == whole.items


def test_a_run_ingests_first_and_a_stage_alone_does_so_too(tmp_path, capsys):
    source = write(tmp_path / "shop", pictures=False)
    run = {"name": "r", "runs": str(tmp_path / "runs"), "catalog": source, "baselines": {"methods": ["random"], "codebook_size": 4}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    main(["baselines", "--config", str(tmp_path / "run.yaml")])
    folder = tmp_path / "runs" / "r" / "ingest"
    manifest = read_manifest(tmp_path / "runs" / "r" / "baselines")
    assert manifest["inputs"]["catalog"] == read_json(folder / MANIFEST)["extra"]["content_sha256"]
    first = stamp(folder)
    main(["run", str(tmp_path / "run.yaml")])
    assert stamp(folder) == first
    main(["catalog", "--config", str(tmp_path / "run.yaml")])
    out = capsys.readouterr().out
    assert "items         12" in out and "not read      brand" in out and "no_picture: 12" in out


@pytest.mark.slow
def test_pictures_looked_at_on_ray_give_the_same_files(tmp_path):
    source = write(tmp_path / "shop", items=20)
    expected = files(mmsid.ingest(tmp_path / "here", source))
    found = mmsid.ingest(tmp_path / "ray", source, engine="ray", ray={"actors": 1, "rows_per_task": 7})
    assert files(found) == expected


def test_a_failed_check_keeps_nothing_of_what_it_saw(tmp_path):
    source = write(tmp_path / "shop")
    kept = {path: path.read_bytes() for path in (tmp_path / "shop").glob("*.png")}
    for path in kept:
        path.unlink()
    with pytest.raises(CatalogError):
        mmsid.ingest(tmp_path / "ingest", source)
    for path, data in kept.items():
        path.write_bytes(data)
    assert Catalog.read(mmsid.ingest(tmp_path / "ingest", source)).problems["picture_missing"] == 24 - len(kept)


def test_a_catalogue_is_described_from_its_columns_as_from_its_items(tmp_path):
    from mmsid.catalog import describe

    source = write(tmp_path / "shop", items=9)
    paths = [[], ["a"], ["b", "x"], ["a", "x"], ["a", "x", "deep"], ["a", "y"], ["b", "x"], ["", "x"], ["c"]]
    rows = [{**row, "categories": path} for row, path in zip(pq.read_table(source["items"]).to_pylist(), paths, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), source["items"])
    catalog = read_catalog(CatalogConfig(**source, fields={"attributes": ["brand"]}))
    facts = describe(catalog)
    of_items = [item.categories for item in catalog.items]
    assert facts["categories_per_depth"] == [len({path[: depth + 1] for path in of_items if len(path) > depth}) for depth in range(3)]
    assert facts["categories_per_depth"] == [4, 3, 1] and facts["attributes"] == ["brand"]
    assert facts["pictures"] == sum(len(item.images) for item in catalog.items) == 12
    assert facts["items_with_text"] == 9 and facts["distinct_contents"] == len(set(catalog.content_hashes))
    assert describe(Catalog(list(catalog.items), catalog.histories, catalog.sha256, catalog.problems, not_read=catalog.not_read)) == facts
    empty = describe(Catalog([]))
    assert (empty["items"], empty["pictures"], empty["items_with_text"], empty["categories_per_depth"]) == (0, 0, 0, [])
