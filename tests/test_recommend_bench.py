"""Bench: selection rules, jobs on a tiny catalogue, and the command with a failing arm, a kill and a second call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_recommend_train import write_catalogue

from mmsid.config import build
from mmsid.errors import ConfigError, MmsidError
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.recommend.bench.files import load_dataset, load_suite
from mmsid.recommend.bench.jobs import Bench, finest_v_measures, ranks_path
from mmsid.recommend.bench.new_items.config import NewItemsSuite
from mmsid.recommend.bench.new_items.plan import NewItemPlan
from mmsid.recommend.bench.plan import Plan
from mmsid.recommend.bench.pool import BUDGET_SPENT, Outcome, Pool
from mmsid.recommend.bench.results import collect
from mmsid.recommend.bench.run import BenchOptions, run
from mmsid.recommend.bench.selection import choose_finalists, choose_trial, select
from mmsid.recommend.classical import CLASSICAL_NAMES
from mmsid.recommend.metrics import SID_LEVEL_GAIN, Ranks
from mmsid.recommend.result_rows import difference_rows, read_ranks

CONFIGS = Path(__file__).parents[1] / "configs" / "bench"
SUITE = {
    "arms": {
        "classical": {"classical": True},
        "random": {"sids": {"method": "random"}},
        "balanced_rq": {"sids": {"method": "balanced_rq", "space": "fused"}},
        "published": {"published": "all"},
    },
    "seeds": [0, 1],
    "baselines": ["balanced_rq", "hybrid_knn"],
    "model": {"d_model": 16, "heads": 2, "hidden": 16, "layers": 1},
    "schedule": {"epochs": 2, "batch_size": 32, "lr": 0.02},
    "trials": [{}, {"model": {"dropout": 0.5}}],
    "budget_minutes": 10,
    "jobs": 2,
}


@pytest.fixture
def dataset(tmp_path) -> DatasetConfig:
    """40 items, 90 users whose histories cycle through one group of items, and one published SID set."""
    folder = tmp_path / "data"
    numbers = write_catalogue(folder)
    sids = {"item_id": list(numbers), "letter": [f"<a_{n // 10}> <b_{n % 10}>" for n in numbers.values()]}
    pq.write_table(pa.table(sids), folder / "reference_sids.parquet")
    settings = {
        "name": "tiny",
        "catalog": {"items": folder / "items.parquet", "sequences": folder / "sequences.parquet"},
        "num_levels": 2,
        "codebook_size": 8,
        "published": {"sids": folder / "reference_sids.parquet"},
    }
    return DatasetConfig(**settings)


def plan_for(dataset: DatasetConfig, work: Path, **changes) -> tuple[Plan, Bench]:
    bench = Bench(dataset, work / "inputs")
    return Plan(dataset, SuiteConfig(**(SUITE | changes)), bench.catalog.sha256, work), bench


def screen(plan: Plan, bench: Bench, *names: str) -> None:
    """Run all screening jobs of some arms in this process."""
    for arm in (arm for arm in plan.arms() if arm.name in names):
        bench(plan.sids(arm, plan.suite.seeds[0]))
        for trial in range(len(plan.suite.trials)):
            bench(plan.fit(arm, trial, plan.suite.seeds[0]))


# --- configurations


@pytest.mark.parametrize("suite", sorted(path.stem for path in (CONFIGS / "suites").glob("*.yaml")))
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "datasets").glob("*.yaml")))
def test_every_shipped_suite_fits_every_shipped_data_set(name, suite):
    data, rules = load_dataset(name), load_suite(suite)
    assert data.name == name
    if isinstance(rules, NewItemsSuite):
        assert NewItemPlan(data, rules, "", Path("work")).tokenizer(0).codebook_size == data.codebook_size
        return
    plan = Plan(data.model_copy(update={"published": None}), rules, "", Path("work"))
    for arm in (arm for arm in plan.arms() if arm.config.kind not in ("sasrec", "refine")):
        spec, own = plan.spec(arm), arm.config.tokenizer or {}
        assert spec.codebook_size == own.get("codebook_size", data.codebook_size) and spec.num_levels == own.get("num_levels", 3)
    assert set(data.left_out) <= {"category_path"} and not set(data.left_out) & {arm.name for arm in plan.arms()}


def test_the_suite_sid_methods_has_every_method():
    suite = load_suite("sid_methods")
    made = {(arm.sids.method, arm.sids.space) for arm in suite.arms.values() if arm.sids}
    assert made >= {(method, space) for method in ("rq_kmeans", "balanced_rq", "rq_vae") for space in ("text", "fused")}
    assert {"random", "category_path"} <= {method for method, _ in made}
    assert {"none", "suffix", "relocate"} <= {arm.sids.collisions for arm in suite.arms.values() if arm.sids}
    assert {"tokenizer", "published", "classical"} <= {arm.kind for arm in suite.arms.values()}
    assert len(suite.seeds) == 5 and suite.within == 0.05


def test_overrides_reach_both_files():
    assert load_dataset("ml_posters", ["catalog.split.method=time", "name=by_time"]).catalog.split.method == "time"
    assert load_suite("quick", ["seeds=[3]"]).seeds == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {"sids": {"method": "random"}, "classical": True}}}, "exactly one"),
        ({"arms": {"item_knn": {"sids": {"method": "random"}}}}, "names of the classical baselines"),
        ({"arms": SUITE["arms"] | {"both": {"fusion": "classical"}}}, "must be a SID arm"),
        ({"claims": ["unknown"]}, "unknown.*is not an arm"),
        ({"seeds": [1, 1]}, "twice"),
        ({"arms": {"ours": {"tokenizer": {"seed": 3}}}}, "set by the bench"),
        ({"trials": [{"model": {"droput": 0.1}}]}, "droput"),
    ],
)
def test_an_invalid_suite_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(SuiteConfig, SUITE | {"baselines": []} | changes, source="suite.yaml", section="")


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match="amazon_beauty"):
        load_dataset("amazon")


# --- selection


def test_the_best_trial_on_valid_is_chosen_and_ties_go_to_the_first():
    assert choose_trial({0: 0.10, 1: 0.12, 2: 0.11}) == 1
    assert choose_trial({0: 0.12, 1: 0.12}) == 0


def test_finalists_are_close_to_the_best_or_listed():
    screened = {"best": 0.100, "edge": 0.095, "below": 0.0949, "claimed": 0.010}
    assert choose_finalists(screened, 0.05, {"claimed", "elsewhere"}) == ["best", "edge", "claimed"]
    assert choose_finalists({}, 0.05, {"claimed"}) == []


def test_differences_use_the_common_seeds():
    users = 400
    hit, miss = Ranks(np.zeros(users, int), np.ones(users, int)), Ranks(np.full(users, 99), np.ones(users, int))
    ranks = {"full": {0: hit, 1: hit, 2: miss}, "screened": {0: miss}, "classical": {None: miss}, "other": {7: hit}}
    rows = {(row["arm"], row["baseline"]): row for row in difference_rows(ranks, ["full", "classical"], "test") if row["metric"] == "HR@10"}
    assert rows["screened", "full"]["mean"] == -1 and rows["screened", "full"]["seeds"] == 1
    assert rows["classical", "full"]["mean"] == pytest.approx(-2 / 3) and rows["classical", "full"]["seeds"] == 3
    assert ("other", "full") not in rows and rows["other", "classical"]["mean"] == 1
    assert rows["screened", "classical"]["mean"] == 0 and not rows["screened", "classical"]["exceeds_noise"]
    assert rows["other", "classical"]["exceeds_noise"] and rows["other", "classical"]["p_holm"] > rows["other", "classical"]["p"]


# --- jobs, in this process


def test_the_trial_is_chosen_by_valid_alone(dataset, tmp_path):
    """Permuted test labels change the test ranks and nothing else."""
    figures, tests = [], []
    for permuted in (False, True):
        plan, bench = plan_for(dataset, tmp_path / f"work{permuted}")
        if permuted:
            bench.split.test[:] = np.random.default_rng(0).permutation(bench.split.test)
        screen(plan, bench, "balanced_rq", "random")
        choice = select(plan)
        rows, _ = collect(plan, choice.trials, ("valid",))
        figures.append((choice, [(row["arm"], row["valid"], row["trial"]) for row in rows]))
        arm = next(arm for arm in plan.arms() if arm.name == "balanced_rq")
        tests.append(read_ranks(ranks_path(plan.fit(arm, 0, 0).folder, arm.name, "test"), "test").ranks.above.tolist())
    assert figures[0] == figures[1]
    assert tests[0] != tests[1]


def test_part_valid_does_not_open_test_ranks(dataset, tmp_path):
    plan, bench = plan_for(dataset, tmp_path / "work")
    screen(plan, bench, "random")
    for path in (plan.work / "jobs").rglob("*.test.parquet"):
        path.unlink()
    (row,), _ = collect(plan, select(plan).trials, ("valid",))
    assert row["metrics"] == {} and row["valid"]["NDCG@10"]["mean"] > 0
    for path in (plan.work / "jobs").rglob("figures.json"):
        assert "test" not in json.loads(path.read_text()).get("random", {})
    with pytest.raises(MmsidError, match=r"test\.parquet"):
        collect(plan, select(plan).trials, ("valid", "test"))


def test_seeds_change_tokenizer_and_recommender_but_not_published_sids(dataset, tmp_path):
    plan, bench = plan_for(dataset, tmp_path / "work")
    by_name = {arm.name: arm for arm in plan.arms()}
    assert list(by_name) == ["random", "balanced_rq", "published_letter"]
    made, imported = by_name["balanced_rq"], by_name["published_letter"]
    assert plan.sids(made, 0).folder != plan.sids(made, 1).folder
    assert plan.sids(imported, 0).folder == plan.sids(imported, 1).folder
    assert plan.fit(imported, 0, 0).folder != plan.fit(imported, 0, 1).folder
    screen(plan, bench, "published_letter")
    (row,), _ = collect(plan, select(plan).trials, ("valid", "test"))
    assert row["collisions"] == 0 and "no tokenizer seed" in row["varies"] and len(row["intrinsic"]["perplexity"]) == 2
    assert row["metrics"][SID_LEVEL_GAIN]["mean"] == row["valid"][SID_LEVEL_GAIN]["mean"] == 0  # no collision, no inflation


def test_collisions_inflate_sid_level_hits(dataset, tmp_path):
    arms = {
        "colliding": {"sids": {"method": "category_path", "collisions": "none"}},
        "hybrid": {"sids": {"method": "random"}, "recommender": "hybrid"},
    }
    rows = pq.read_table(dataset.catalog.items).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"categories": [row["title"].split()[-1]]} for row in rows]), dataset.catalog.items)
    plan, bench = plan_for(dataset, tmp_path / "work", arms=arms, trials=[{}], baselines=[])
    screen(plan, bench, "colliding", "hybrid")
    rows = {row["arm"]: row["metrics"] for row in collect(plan, select(plan).trials, ("valid", "test"))[0]}
    # four SIDs of ten items: each is among the ten best distinct SIDs, while an item has one of up to forty ranks
    assert rows["colliding"][SID_LEVEL_GAIN]["mean"] == pytest.approx(1 - rows["colliding"]["HR@10"]["mean"])
    assert SID_LEVEL_GAIN not in rows["hybrid"], "the hybrid recommender ranks items, not SIDs"


def test_fusion_and_sasrec_are_screened_in_their_own_families(dataset, tmp_path):
    arms = SUITE["arms"] | {"sasrec": {"sasrec": True}, "fused": {"fusion": "published_letter"}}
    plan, _ = plan_for(dataset, tmp_path, arms=arms, claims=["fused"])
    by_name = {arm.name: arm for arm in plan.arms()}
    assert set(by_name) == {"random", "balanced_rq", "published_letter", "sasrec"}
    fit = plan.fit(by_name["published_letter"], 0, 0)
    assert (fit.fusion, fit.classical) == ("fused", plan.classical().folder) and set(fit.needs) == {fit.sids, fit.classical}
    assert plan.fit(by_name["sasrec"], 0, 0).needs == ()
    assert [row.family for row in plan.rows(by_name["published_letter"])] == ["sid", "fusion"]
    assert by_name["sasrec"].family == "classical"


def test_changed_inputs_give_another_job_folder(dataset, tmp_path):
    def folder(plan: Plan) -> str:
        return plan.fit(plan.arms()[0], 0, 0).folder.name

    plan, _ = plan_for(dataset, tmp_path)
    first = folder(plan)
    assert folder(Plan(dataset, plan.suite, plan.catalog_sha256, tmp_path / "elsewhere")) == first
    assert folder(Plan(dataset, plan.suite, "another", tmp_path)) != first
    assert folder(plan_for(dataset, tmp_path, schedule=SUITE["schedule"] | {"epochs": 3})[0]) != first
    assert folder(plan_for(dataset.model_copy(update={"codebook_size": 9}), tmp_path)[0]) != first


def test_unsupported_arms_are_listed_with_reasons(dataset, tmp_path):
    bare = dataset.model_copy(update={"published": None, "left_out": {"random": "for a reason"}})
    plan, _ = plan_for(bare, tmp_path)
    assert [arm.name for arm in plan.arms()] == ["balanced_rq"]
    assert plan.left_out() == {"random": "for a reason", "published": "the data set has no published SIDs"}


# --- processes


class Sum:
    """A job of the pool test: `number` -1 kills its process, -2 fails."""

    def __init__(self, number: int, needs: tuple[int, ...] = ()) -> None:
        self.key, self.needs = number, needs

    def __call__(self) -> None:
        if self.key == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.key == -2:
            raise MmsidError("one cannot add that")


def prepare():
    return lambda job: job()


@pytest.mark.slow
def test_a_killed_process_loses_its_own_job_only(tmp_path):
    jobs = [Sum(1), Sum(-1), Sum(-2), Sum(2, (1,)), Sum(3, (-2,)), Sum(4)]
    done = set()
    with Pool(prepare, 2, tmp_path) as pool:
        ended: dict[int, Outcome] = {outcome.job.key: outcome for outcome in pool.run(jobs, done)}
        again = list(pool.run([Sum(5), Sum(6)], done, may_start=lambda: False))
    assert done == {1, 2, 4}
    assert "signal 9" in ended[-1].error and ended[-2].error == "one cannot add that"
    assert not ended[3].started and "one cannot add that" in ended[3].error
    assert [(outcome.error, outcome.started) for outcome in again] == [(BUDGET_SPENT, False)] * 2


def stamps(work: Path) -> dict[str, int]:
    """Modification times of the manifests of finished jobs, without drafts, which get their manifest before they are renamed."""
    finished = [path for path in sorted(work.rglob("manifest.json")) if not any(part.endswith(".draft") for part in path.parts)]
    return {str(path): path.stat().st_mtime_ns for path in finished}


@pytest.mark.slow
def test_the_command_resumes_after_a_kill_reports_a_failing_arm_and_then_does_nothing(dataset, tmp_path):
    hybrid = {"sids": {"method": "random"}, "recommender": "hybrid"}
    working = SUITE | {"arms": SUITE["arms"] | {"hybrid": hybrid, "sasrec": {"sasrec": True}, "fused": {"fusion": "random"}}}
    suite = working | {"arms": working["arms"] | {"broken": {"sids": {"method": "random", "num_levels": 1, "codebook_size": 2}}}}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(json.loads(dataset.model_dump_json(exclude={"name"}, exclude_none=True))))
    command = [sys.executable, "-m", "mmsid.cli", "bench", "--dataset", "tiny.yaml", "--suite", "rules.yaml", "--results", "out"]
    # kill all processes as soon as one job is finished
    first = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    work = tmp_path / "runs" / "bench" / "tiny" / "rules"
    until = time.monotonic() + 300
    while not (kept := stamps(work)) and time.monotonic() < until and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert kept and not (tmp_path / "out").exists()

    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert second.returncode == 1 and "broken (sids, seed 0)" in second.stderr and "2 codes give 2 SIDs" in second.stderr
    after = stamps(work)
    assert kept.items() <= after.items() and len(after) > len(kept)
    text = (tmp_path / "out" / "tiny.json").read_text()
    written = json.loads(text)
    assert set(written) == {"dataset", "arms", "differences"}
    assert "item0" not in text and '"u1"' not in text
    rows = {row["arm"]: row for row in written["arms"]}
    assert set(rows) == {*CLASSICAL_NAMES, "random", "balanced_rq", "published_letter", "hybrid", "sasrec", "fused"}
    assert {name for name, row in rows.items() if row["family"] == "fusion"} == {"hybrid", "fused"}
    assert rows["balanced_rq"]["seeds"] == [0, 1] and rows["balanced_rq"]["metrics"]["NDCG@10"]["std"] >= 0
    assert rows["hybrid_knn"]["family"] == "classical" and rows["random"]["family"] == "sid"
    assert written["dataset"]["not_run"][0]["arm"] == "broken"
    table = (tmp_path / "out" / "tiny.md").read_text()
    assert table.index("| hybrid_knn |") < table.index("| popularity |") < table.index("| balanced_rq | sid |")
    assert "## Not run" in table and "p (Holm)" in table and f"| {SID_LEVEL_GAIN} |" in table

    options = BenchOptions(suite_name="rules", results=tmp_path / "out", runs=tmp_path / "runs")
    shutil.copy(tmp_path / "out" / "tiny.json", tmp_path / "before.json")
    path = run(load_dataset(str(tmp_path / "tiny.yaml")), SuiteConfig(**working), options)
    assert stamps(work) == after
    again = json.loads(path.read_text())
    assert again["arms"] == written["arms"] and again["differences"] == written["differences"]


def test_the_finest_category_is_one_that_most_items_have():
    """The last level of a ragged tree has two items, which any codes separate; it is ignored."""
    records = [
        {"depth": depth, "items": items, "v_measure": value}
        for depth, items, values in ((1, 100, (0.2, 0.3)), (2, 60, (0.5, 0.6)), (3, 50, (0.9, 0.9)), (4, 2, (1.0, 1.0)))
        for value in values
    ]
    assert finest_v_measures(records) == [0.5, 0.6] and finest_v_measures([]) is None
