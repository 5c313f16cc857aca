"""Report page without a browser: positions of marks, contents, untrusted text, size, and the commands that write it."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_run import ATTACK, results, write_catalog, write_run

from mmsid import cli
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.errors import ArtifactError
from mmsid.report import explore, thumbnails
from mmsid.report.charts import SINGLE_SEED_NOTE, difference_charts, gate_marks, metric_charts, seed_count
from mmsid.report.page import write_results_page, write_run_page
from mmsid.report.run_folder import catalog_of_run
from mmsid.report.summary import ReportConfig
from mmsid.report.summary import run as run_stage
from mmsid.sids.table import SidTable


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of 40 items and its catalogue."""
    folder = tmp_path_factory.mktemp("made")
    config = write_catalog(folder / "catalog", items=40)
    return write_run(folder / "runs" / "drawn", config), config


def data_of(page: str, name: str = "data"):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1])


def test_positions_of_marks_by_hand():
    rows = [
        {"arm": "weak", "family": "sid", "metrics": {"NDCG@10": {"mean": 0.1, "std": 0.0}}},
        {"arm": "strong", "family": "sid", "metrics": {"coverage@10": {"mean": 0.5, "std": 0.0}, "NDCG@10": {"mean": 0.3, "std": 0.1}}},
    ]
    first, second = metric_charts(rows)
    # an axis from 0 to 0.4 on 96 % of the strip, after a margin of 2 %
    assert (first.metric, second.metric) == ("NDCG@10", "coverage@10")
    assert [(mark.label, mark.low, mark.mean, mark.high) for mark in first.marks] == [("strong", 50, 74, 98), ("weak", 26, 26, 26)]
    assert first.marks[0].text == "0.3000 ± 0.1000" and first.marks[1].text == "0.1000"
    assert first.ticks == [(2, "0.0"), (26, "0.1"), (50, "0.2"), (74, "0.3"), (98, "0.4")]


def test_differences_are_better_worse_or_noise():
    spans = {"a": (0.1, 0.3), "b": (-0.1, 0.1), "c": (-0.1, -0.06)}
    row = {"baseline": "base", "part": "test", "metric": "HR@10"}
    rows = [row | {"arm": name, "mean": (low + high) / 2, "low": low, "high": high} for name, (low, high) in spans.items()]
    (chart,) = difference_charts([*rows, rows[0] | {"part": "valid"}], "test")["base"]
    assert [(mark.label, mark.family) for mark in chart.marks] == [("a", "better"), ("b", "noise"), ("c", "worse")]
    assert chart.metric == "HR@10" and chart.zero == 26  # an axis from -0.1 to 0.3
    # corrected for multiple comparisons, the first is within noise
    (chart,) = difference_charts([rows[0] | {"exceeds_noise": False}], "test")["base"]
    assert chart.marks[0].family == "noise"


def test_positive_changes_of_gate_marks_are_improvements():
    row = {"role": "guard", "passed": True}
    falls = row | {"metric": "lift", "before": 2.0, "after": 1.9, "margin": 0.2, "better": "higher", "source": "10% of the figure before"}
    grows = row | {"metric": "raw_collisions", "before": 0.2, "after": 0.1, "margin": 0.02, "better": "lower"}
    lift, collisions = gate_marks([falls, grows])
    assert (lift.change, lift.limit) == (pytest.approx(50 - 50 / 2.2, abs=0.01), pytest.approx(50 - 50 / 1.1, abs=0.01))
    assert collisions.change == pytest.approx(50 + 50 / 1.1, abs=0.01) and collisions.metric == "raw collisions"
    assert lift.source == "10% of the figure before" and collisions.source == ""


def test_pictures_are_spread_over_the_branches():
    codes = np.array([[0, 0, 1], [0, 0, 2], [0, 0, 3], [1, 0, 0], [1, 5, 0], [1, 5, 1]])
    assert explore.spread(codes).tolist() == [0, 3, 4, 1, 5, 2]


def test_collisions_count_content_and_not_copies():
    raw = np.array([[0, 0], [0, 0], [0, 0], [1, 1], [1, 1], [2, 2]])
    published = np.array([[0, 0], [0, 1], [0, 0], [1, 1], [1, 1], [2, 2]])
    table = SidTable.from_codes([f"i{n}" for n in range(6)], published, (4, 4), raw_codes=raw)
    found = explore.collisions(table, ["a", "b", "c", "d", "d", "e"], shown=6)
    assert found["raw"] == {"3": 1} and found["published"] == {"2": 1}  # the two items of content d count as one
    assert found["duplicates"] == 2 and found["changed"] == 1 and found["buckets"] == [[0, 1, 2]]


@pytest.mark.parametrize("text", ["short", "x" * 300, "<" * 300, "漢字" * 200, "\ud800 alone" * 30, '"\\' * 100])
def test_clipped_text_has_at_most_its_bytes(text):
    clipped = explore.clip(text, 120)
    assert len(explore.embedded_json(clipped).encode()) <= 120
    assert clipped == text or (clipped.endswith("…") and text.startswith(clipped[:-1]) and len(clipped) > 10)


def test_thumbnails_are_small_limited_and_skip_broken_pictures(tmp_path, monkeypatch):
    config = write_catalog(tmp_path, items=12, picture_size=200)
    items = read_catalog(config).items
    broken = next(row for row, item in enumerate(items) if item.images)
    data = items[broken].images[0].read_bytes()
    items[broken].images[0].write_bytes(data[:300] + data[-2:])
    with_picture = [row for row, item in enumerate(items) if item.images]
    found = thumbnails.thumbnails(items, range(12), config)
    assert set(found) == set(with_picture) - {broken} and len(found) == 7
    sizes = {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in found.values()}
    assert sizes == {(thumbnails.SIZE, thumbnails.SIZE)}
    first, second = [found[row] for row in with_picture if row != broken][:2]
    monkeypatch.setattr(thumbnails, "MAX_CHARACTERS", len(first) + len(second))
    assert list(thumbnails.thumbnails(items, range(12), config).values()) == [first, second]
    monkeypatch.setattr(thumbnails, "MAX_PICTURES", 2)  # the broken picture counts
    assert list(thumbnails.thumbnails(items, range(12), config).values()) == [first]


def test_the_page_is_deterministic_and_contains_the_run_and_no_external_address(made, tmp_path):
    run, config = made
    first, second = (write_run_page(run, config, tmp_path / name).read_text(encoding="utf-8") for name in ("a.html", "b.html"))
    assert first == second
    assert "http:" not in first and "https:" not in first and "url(" not in first and "@import" not in first
    data = data_of(first)
    assert [method["name"] for method in data["methods"]] == ["ours", "ours_refined"] and data["total"] == 40
    assert data["methods"][0]["counts"][0] == [20, 20, 0, 0, 0, 0, 0, 0]
    assert data["moved"]["count"] == 4 and data["moved"]["rows"][0]["gain"] == 0.5
    assert set(map(int, data_of(first, "pictures"))) == {row for row, item in enumerate(read_catalog(config).items) if item.images}
    assert "0.0740 ± 0.0040" in first and "The acceptance gate accepted the refined codes." in first


def test_untrusted_text_is_escaped(made, tmp_path):
    run, config = made
    page = write_run_page(run, config, tmp_path / "page.html").read_text(encoding="utf-8")
    assert ATTACK in data_of(page)["items"]["title"]
    # two blocks of data and one script, and only tags of the template
    assert page.count("<script") == page.count("</script>") == 3 and "onerror" in page and "<img" not in page.replace("`", "")
    hostile = results()
    hostile["arms"][0]["arm"] = hostile["dataset"] = ATTACK
    (tmp_path / "x.json").write_text(json.dumps(hostile))
    page = write_results_page(tmp_path / "x.json", tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("<script") == 3 and "&lt;/script&gt;&lt;script&gt;window.attacked" in page


def test_a_refused_refinement_shows_its_reasons(tmp_path):
    config = write_catalog(tmp_path / "catalog", items=24)
    page = write_run_page(write_run(tmp_path / "run", config, accepted=False), config, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The acceptance gate refused" in page and "gaining in 61% of the draws" in page and "Items that would have moved" in page


def test_a_larger_catalogue_shows_some_items_and_counts_all(made, tmp_path, monkeypatch):
    run, config = made
    monkeypatch.setattr(explore, "MAX_ITEMS", 10)
    page = write_run_page(run, config, tmp_path / "page.html").read_text(encoding="utf-8")
    data = data_of(page)
    method = data["methods"][0]
    assert len(data["items"]["id"]) == len(method["codes"]) == 10 and "10 of 40 items are in this page" in page
    assert sum(method["counts"][0]) == 40 and all(row < 10 for bucket in method["collisions"]["buckets"] for row in bucket)


def test_results_of_one_seed_are_marked(tmp_path):
    pages = {}
    for seeds in (1, 2):
        (tmp_path / "x.json").write_text(json.dumps(results(seeds)))
        pages[seeds] = write_results_page(tmp_path / "x.json", tmp_path / f"{seeds}.html").read_text(encoding="utf-8")
    assert SINGLE_SEED_NOTE in pages[1] and SINGLE_SEED_NOTE not in pages[2]
    assert "one standard deviation over 2 seeds" in pages[2] and "standard deviation" not in pages[1]
    assert seed_count([row for row in results()["arms"] if row["family"] != "sid"]) == 0


def test_intrinsic_metrics_are_marked_as_those_of_one_seed(made, tmp_path):
    run, config = made
    page = write_run_page(run, config, tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count(SINGLE_SEED_NOTE) == 1 and page.index('id="figures-title"') < page.index(SINGLE_SEED_NOTE)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_summary_of_a_single_seed_run_contains_the_note(tmp_path, seeds, capsys):
    config = write_catalog(tmp_path / "catalog", items=24)
    run = write_run(tmp_path / "run", config, seeds=seeds)
    out = run_stage(ReportConfig(out=tmp_path / "report", run=run, catalog=config))
    assert (out / "summary.md").read_text(encoding="utf-8").count(SINGLE_SEED_NOTE) == (seeds == 1)


def test_the_stage_writes_page_and_summary(made, tmp_path, capsys):
    run, config = made
    out = run_stage(ReportConfig(out=tmp_path / "report", run=run, catalog=config))
    assert (out / "report.html").stat().st_size > 20_000 and "## Examples" in (out / "summary.md").read_text(encoding="utf-8")


def test_the_command_finds_the_catalogue_of_a_run_in_another_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_catalog(tmp_path / "work" / "catalog", items=16)
    write_run(Path("runs/drawn"), CatalogConfig(items="catalog/items.parquet"))
    monkeypatch.chdir(tmp_path)
    cli.main(["report", "work/runs/drawn"])
    assert (tmp_path / "work/runs/drawn/report.html").is_file()
    (tmp_path / "work/runs/drawn").rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        cli.main(["report", "moved"])
    assert "mmsid report moved catalog.items=FILE" in capsys.readouterr().err
    cli.main(["report", "moved", "catalog.items=work/catalog/items.parquet"])
    assert (tmp_path / "moved/report.html").is_file()


def test_the_command_shows_results_of_a_benchmark(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps(results()))
    cli.main(["report", str(tmp_path / "x.json")])
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert data_of(page) is None and "Compared with ours" in page and 'id="tree"' not in page and "(test)" in page
    valid_only = results()
    valid_only["dataset"] = {"name": "drawn", "not_run": [{"arm": "tiger", "reason": "no time left"}]}
    for row in valid_only["arms"]:
        row["valid"], row["metrics"] = row["metrics"], {}
    (tmp_path / "x.json").write_text(json.dumps(valid_only))
    page = write_results_page(tmp_path / "x.json", tmp_path / "x.html").read_text(encoding="utf-8")
    assert "(valid)" in page and "0.0740 ± 0.0040" in page and "tiger: no time left" in page
    (tmp_path / "y.json").write_text('{"rows": []}')
    with pytest.raises(ArtifactError, match="holds no list `arms`"):
        write_results_page(tmp_path / "y.json", tmp_path / "y.html")


def test_a_folder_without_finished_stages_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no finished stage"):
        catalog_of_run(tmp_path)


@pytest.mark.slow
def test_ten_thousand_items_stay_under_twenty_megabytes(tmp_path):
    """Long texts, and a picture of noise for two of three items: the largest page that the budgets allow."""
    config = write_catalog(tmp_path / "catalog", items=10_000, words=150, pictures=300)
    out = write_run_page(write_run(tmp_path / "run", config), config, tmp_path / "page.html")
    assert len(data_of(out.read_text(encoding="utf-8"))["items"]["id"]) == 10_000
    assert 8e6 < out.stat().st_size < 20e6
