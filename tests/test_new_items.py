"""New-item benchmark on a tiny catalogue: what may influence what, the methods, results, resumption, and the command."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from test_recommend_train import write_catalogue
from tiny_backbones import tiny_bert

from mmsid.artifacts import read_json, read_table, read_tensors
from mmsid.cli import main
from mmsid.errors import ConfigError
from mmsid.recommend.bench.config import DatasetConfig
from mmsid.recommend.bench.files import load_suite
from mmsid.recommend.bench.new_items import methods
from mmsid.recommend.bench.new_items.config import METHODS, NewItemsSuite
from mmsid.recommend.bench.new_items.jobs import NewItemBench, method_ranks
from mmsid.recommend.bench.new_items.methods import best_on_valid, cosines, liger_methods
from mmsid.recommend.bench.new_items.plan import Draw
from mmsid.recommend.bench.new_items.run import run_new_items
from mmsid.recommend.bench.run import BenchOptions
from mmsid.recommend.evaluate import evaluate
from mmsid.recommend.metrics import Ranks, grouped_bootstrap, paired_bootstraps
from mmsid.recommend.training import table_paths
from mmsid.sids import SidTable

RETRAINED = ("retrained_sid_transformer", "retrained_hybrid")
DRAW = Draw("hidden", 0)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> NewItemsSuite:
    bert = tiny_bert(tmp_path_factory.mktemp("bert"))
    return NewItemsSuite(
        protocols=["hidden"],
        draws=1,
        share=0.2,
        tokenizer={"backbone": {"path": bert, "max_length": 40}, "steps": 1, "batch_size": 8, "reconstruct": "off"},
        model={"d_model": 16, "heads": 2, "hidden": 16, "layers": 1},
        schedule={"epochs": 2, "batch_size": 32, "lr": 0.02},
        jobs=1,
    )


def dataset_in(folder) -> DatasetConfig:
    catalog = {"items": folder / "items.parquet", "sequences": folder / "sequences.parquet"}
    return DatasetConfig(name="tiny", catalog=catalog, num_levels=2, codebook_size=8)


def run_all(bench: NewItemBench, draw: Draw = DRAW) -> None:
    for job in bench.plan.jobs(draw, bench.plan.methods(draw.protocol)):
        bench(job)


def first_item_first(world, text, seed) -> Ranks:
    """A further method: items in the order of the catalogue."""
    order = -torch.arange(len(world.new), dtype=torch.float32)
    return evaluate(lambda histories: order.repeat(len(histories), 1), world.whole, "test", len(world.new)).ranks


@pytest.fixture(scope="module")
def finished(tmp_path_factory, suite) -> NewItemBench:
    """A bench whose jobs are all finished, with one further method."""
    folder = tmp_path_factory.mktemp("plain")
    write_catalogue(folder / "data")
    work = folder / "runs" / "bench" / "tiny" / "new_items"
    bench = NewItemBench(dataset_in(folder / "data"), suite, work, {"first": first_item_first})
    run_all(bench)
    return bench


@pytest.fixture(scope="module")
def permuted(tmp_path_factory, suite, finished) -> NewItemBench:
    """The same after every interaction with a hidden item went to another hidden item."""
    folder = tmp_path_factory.mktemp("permuted")
    write_catalogue(folder / "data")
    hidden = [finished.item_ids[row] for row in np.flatnonzero(finished.world(DRAW).new)]
    other = dict(zip(hidden, hidden[3:] + hidden[:3], strict=True))
    rows = pq.read_table(folder / "data" / "sequences.parquet").to_pylist()
    changed = [row | {"items": [other.get(item, item) for item in row["items"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(changed), folder / "data" / "sequences.parquet")
    bench = NewItemBench(dataset_in(folder / "data"), suite, folder / "runs")
    run_all(bench)
    return bench


def ranks_by_user(bench: NewItemBench, method: str) -> dict[str, tuple[int, int]]:
    table = read_table(method_ranks(bench.plan.job(DRAW, method).folder, method)).to_pydict()
    return dict(zip(table["user_id"], zip(table["above"], table["tied"], strict=True), strict=True))


# --- hidden interactions


def test_hidden_interactions_change_nothing_that_is_fitted(finished, permuted):
    """SIDs, tuned parameters and early stopping are equal, and so are the ranks of users who met no hidden item."""
    for name in ("ours", "balanced_rq_text", "random"):
        tables = [SidTable.load(bench.plan.sids(DRAW, name).folder).align(finished.item_ids) for bench in (finished, permuted)]
        assert np.array_equal(tables[0].codes, tables[1].codes) and np.array_equal(tables[0].raw_codes, tables[1].raw_codes)
    world = finished.world(DRAW)
    untouched = [user.user_id for user in finished.catalog.histories if not world.new[user.rows].any()]
    assert 10 < len(untouched) < len(finished.catalog.histories)
    for method in (method for method in METHODS if method not in RETRAINED):
        jobs = [bench.plan.job(DRAW, method) for bench in (finished, permuted)]
        assert jobs[0].folder.name != jobs[1].folder.name  # these are two runs
        parameters = [read_json(job.folder / "figures.json")["parameters"][method] for job in jobs]
        assert parameters[0] == parameters[1], method
        ranks = [ranks_by_user(bench, method) for bench in (finished, permuted)]
        assert [ranks[0][user] for user in untouched] == [ranks[1][user] for user in untouched], method


def test_only_retrained_methods_read_hidden_interactions(finished, permuted):
    found = [read_json(bench.plan.job(DRAW, RETRAINED[0]).folder / "figures.json")["parameters"] for bench in (finished, permuted)]
    assert found[0] != found[1]
    for bench in (finished, permuted):
        known, grown = bench.known_catalogues(DRAW)
        assert known.sequences == grown.sequences and grown.items == bench.dataset.catalog.items
        new = {bench.item_ids[row] for row in np.flatnonzero(bench.world(DRAW).new)}
        assert not new & set(pq.read_table(known.items)["item_id"].to_pylist())
        assert not new & {item for row in pq.read_table(known.sequences)["items"].to_pylist() for item in row}


def test_appended_items_leave_published_codes_alone(finished):
    job = finished.plan.sids(DRAW, "ours")
    published, grown = SidTable.load(job.folder.with_name(f"{job.folder.name}-published")), SidTable.load(job.folder)
    assert len(published) == 32 and len(grown) == 40 and len(np.unique(grown.codes, axis=0)) == 40
    assert np.array_equal(grown.align(published.item_ids).codes, published.codes)


# --- methods


def test_cosines_by_hand():
    unit = np.eye(2, dtype=np.float32)[[0, 1, 1]]
    scores = cosines(unit, [np.array([0, 1]), np.array([0])], 0.5)  # user vectors (1/3, 2/3) and (1, 0)
    assert torch.allclose(scores, torch.tensor([[1 / 3, 2 / 3, 2 / 3], [1.0, 0.0, 0.0]]))


def test_tuning_takes_the_best_point_on_known_valid_items_and_the_first_of_equal_ones(finished):
    split = finished.world(DRAW).fit_known
    target = {tuple(rows): item for rows, item in zip(split.train, split.valid, strict=True) if item >= 0}

    def scores(histories):
        nothing = torch.zeros(len(histories), 32)
        yield nothing
        for _ in range(2):
            yield nothing.clone().scatter_(1, torch.tensor([[target[tuple(rows)]] for rows in histories]), 1.0)

    assert best_on_valid(["nothing", "true item", "the same again"], scores, split) == "true item"


def test_liger_joins_the_beam_with_all_new_items(finished, monkeypatch):
    monkeypatch.setattr(methods, "BEAMS", 5)
    job, world = finished.plan.job(DRAW, "liger"), finished.world(DRAW)
    paths = table_paths(SidTable.load(job.sids).align(finished.item_ids))
    weights = read_tensors(job.decoder / "decoder.safetensors")
    vectors = np.random.default_rng(0).normal(size=(40, 4))
    found = liger_methods(world, weights, paths, finished.suite.model.shape(), vectors)
    history = [world.known[[1, 2]], world.known[[5]]]
    for score, parameters in found.values():
        scores = score(history)
        reached = torch.isfinite(scores).numpy()
        assert reached[:, world.new].all() and (reached[:, ~world.new].sum(1) <= 5).all() and parameters["beams"] == 5
    unweighted = found["liger"][0](history).numpy()
    expected = cosines(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), history, found["liger"][1]["decay"]).numpy()
    assert np.allclose(unweighted[np.isfinite(unweighted)], expected[np.isfinite(unweighted)], atol=1e-6)


# --- results


def test_group_differences_average_over_draws():
    values, baseline = np.array([[1.0, 1, 0, 0], [0, 0, 1, 0]]), np.zeros((2, 4))
    member = np.array([[True, True, True, False], [False, False, True, True]])
    assert grouped_bootstrap(values, baseline, member).mean == pytest.approx((2 / 3 + 1 / 2) / 2)
    rng = np.random.default_rng(0)
    values, baseline = rng.random((3, 400)), rng.random((3, 400)) - 0.03
    grouped, (paired,) = grouped_bootstrap(values, baseline, np.ones((3, 400), bool)), paired_bootstraps([(values, baseline)])
    assert grouped.mean == pytest.approx(paired.mean) and grouped.detectable == pytest.approx(paired.detectable, rel=0.1)


def options_for(bench: NewItemBench, tmp_path, **changes) -> BenchOptions:
    return BenchOptions(**({"suite_name": "new_items", "results": tmp_path / "out", "runs": bench.work.parents[2]} | changes))


def test_results_of_finished_jobs(finished, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in finished.work.rglob("manifest.json")}
    path = run_new_items(finished.dataset, finished.suite, options_for(finished, tmp_path), {"first": first_item_first})
    written = json.loads(path.read_text())
    assert {path: path.stat().st_mtime_ns for path in finished.work.rglob("manifest.json")} == stamps  # nothing ran again
    entry = written["datasets"]["tiny"]
    assert set(entry["methods"]) == {*METHODS, "first"} and list(entry["methods"])[-2:] == list(RETRAINED)
    for row in entry["methods"].values():
        for group in ("new", "rare", "all"):
            assert set(row[group]) == {"HR@10", "HR@50", "NDCG@10"} or row[group] == {}
        assert row["all"]["HR@50"] == {"mean": pytest.approx(1.0), "sd": None} or row["all"]["HR@50"]["mean"] <= 1
        assert row["draws"] == 1
    (draw,) = entry["draws"]
    assert draw["new_items"] == 8 and draw["users"]["all"] == 90 and 0 < draw["users"]["new"] < 90
    assert draw["methods"]["tfidf"]["new"]["HR@10"] == entry["methods"]["tfidf"]["new"]["HR@10"]["mean"]
    assert draw["parameters"]["liger_weighted"]["beams"] == 50
    compared = {(row["group"], row["metric"]): row for row in entry["differences"]}
    assert compared["all", "HR@10"]["baseline"] == "classical_hybrid" and compared["new", "NDCG@10"]["method"] == "hybrid/ours"
    best = max(("tfidf", "minilm_cosine", "emb_cosine"), key=lambda name: entry["methods"][name]["new"]["NDCG@10"]["mean"])
    gap = entry["methods"]["hybrid/ours"]["new"]["NDCG@10"]["mean"] - entry["methods"][best]["new"]["NDCG@10"]["mean"]
    assert compared["new", "NDCG@10"]["baseline"] == best and compared["new", "NDCG@10"]["mean"] == pytest.approx(gap)
    assert entry["not_run"] == [] and "item0" not in path.read_text()
    table = (tmp_path / "out" / "new_items.md").read_text()
    assert "| hybrid/ours | 1 |" in table and "Users by group: new " in table


def test_other_data_sets_and_earlier_peers_stay_in_the_file(finished, tmp_path):
    path = run_new_items(finished.dataset, finished.suite, options_for(finished, tmp_path))
    entry = json.loads(path.read_text())["datasets"]["tiny"]
    assert "first" in entry["methods"]  # finished by an earlier call that added it
    other = finished.dataset.model_copy(update={"name": "again"})
    runs = options_for(finished, tmp_path).runs
    (runs / "bench" / "again").symlink_to(runs / "bench" / "tiny")
    path = run_new_items(other, finished.suite, options_for(finished, tmp_path))
    written = json.loads(path.read_text())["datasets"]
    assert written["tiny"] == entry and written["again"]["methods"] == entry["methods"]


def test_missing_draws_are_listed(finished, tmp_path):
    three = finished.suite.model_copy(update={"draws": 2, "methods": ["tfidf", "item_knn"]})
    path = run_new_items(finished.dataset, three, options_for(finished, tmp_path, stage="screen"))
    entry = json.loads(path.read_text())["datasets"]["tiny"]
    assert [row["draw"] for row in entry["draws"]] == [0]
    assert [(row["method"], row["draws"]) for row in entry["not_run"]] == [("tfidf", [1]), ("item_knn", [1])]
    assert "draws 1, not requested in this call: tfidf, item_knn" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"), [({"only": ("tf-idf",)}, "'tf-idf' is not a method"), ({"part": "valid"}, "test users only")]
)
def test_refused_options(finished, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_new_items(finished.dataset, finished.suite, options_for(finished, tmp_path, **changes))


def test_the_shipped_suite_has_every_method_and_three_draws():
    suite = load_suite("new_items")
    assert isinstance(suite, NewItemsSuite) and suite.draws == 3 and suite.methods == list(METHODS)
    with pytest.raises(ConfigError, match="set by the bench"):
        load_suite("new_items", ["tokenizer={seed: 3}"])
    with pytest.raises(ConfigError, match="best_of_all"):
        load_suite("new_items", ["methods=[best_of_all]"])


@pytest.mark.slow
def test_the_command_reports_a_failed_job_and_resumes(finished, tmp_path, capsys):
    """`ours` fails, because one level of two codes gives only two SIDs for 32 items; the retrievers are ranked nevertheless."""
    plain = {"protocols": ["hidden"], "draws": 1, "share": 0.2, "jobs": 1, "methods": ["tfidf", "minilm_cosine", "emb_cosine"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plain | {"tokenizer": {"num_levels": 1, "codebook_size": 2, "steps": 0}}))
    data = finished.dataset.model_dump(mode="json", exclude_none=True, exclude={"name"})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    command = ["bench", "--dataset", "tiny.yaml", "--suite", "mine.yaml", "--results", "out"]
    done = subprocess.run([sys.executable, "-m", "mmsid.cli", *command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "1 jobs failed" not in done.stderr and "2 jobs failed" in done.stderr, done.stderr
    entry = json.loads((tmp_path / "out" / "new_items.json").read_text())["datasets"]["tiny"]
    assert set(entry["methods"]) == {"tfidf", "minilm_cosine"}
    assert [row["method"] for row in entry["not_run"]] == ["emb_cosine"] and "depends on failed" in entry["not_run"][0]["reason"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        main([*command, "--only", "tfidf"])  # finished: nothing runs, nothing fails
    assert "1 jobs were finished earlier, 0 to run" in capsys.readouterr().err
