"""The bench: its rules by hand, its jobs on a tiny catalogue, and the whole command with a failing arm, a kill and a second call."""

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
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig, load_dataset, load_suite
from mmsid.recommend.bench.jobs import Bench, finest_v_measures, ranks_path
from mmsid.recommend.bench.plan import Plan
from mmsid.recommend.bench.pool import BUDGET_SPENT, Outcome, Pool
from mmsid.recommend.bench.results import collect
from mmsid.recommend.bench.run import BenchOptions, run
from mmsid.recommend.bench.selection import choose_finalists, choose_trial, judge
from mmsid.recommend.classical import CLASSICAL_NAMES
from mmsid.recommend.metrics import Ranks
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
    """40 items, 90 users who walk through their group in a circle, and one published SID set."""
    folder = tmp_path / "data"
    numbers = write_catalogue(folder)
    sids = {"item_id": list(numbers), "someone": [f"<a_{n // 10}> <b_{n % 10}>" for n in numbers.values()]}
    pq.write_table(pa.table(sids), folder / "reference_sids.parquet")
    described = {
        "name": "tiny",
        "catalog": {"items": folder / "items.parquet", "sequences": folder / "sequences.parquet"},
        "num_levels": 2,
        "codebook_size": 8,
        "published": {"sids": folder / "reference_sids.parquet"},
    }
    return DatasetConfig(**described)


def plan_for(dataset: DatasetConfig, work: Path, **changes) -> tuple[Plan, Bench]:
    bench = Bench(dataset, work / "inputs")
    return Plan(dataset, SuiteConfig(**(SUITE | changes)), bench.catalog.sha256, work), bench


def screen(plan: Plan, bench: Bench, *names: str) -> None:
    """All screening jobs of some arms, in this process."""
    for arm in (arm for arm in plan.arms() if arm.name in names):
        bench(plan.sids(arm, plan.suite.seeds[0]))
        for trial in range(len(plan.suite.trials)):
            bench(plan.fit(arm, trial, plan.suite.seeds[0]))


# --- what is shipped, and what is refused


@pytest.mark.parametrize("suite", sorted(path.stem for path in (CONFIGS / "suites").glob("*.yaml")))
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "datasets").glob("*.yaml")))
def test_every_shipped_suite_fits_every_shipped_data_set(name, suite):
    data, rules = load_dataset(name), load_suite(suite)
    assert data.name == name
    plan = Plan(data.model_copy(update={"published": None}), rules, "", Path("work"))
    for arm in (arm for arm in plan.arms() if arm.config.kind not in ("sasrec", "refine")):
        spec, own = plan.spec(arm), arm.config.tokenizer or {}
        assert spec.codebook_size == own.get("codebook_size", data.codebook_size) and spec.num_levels == own.get("num_levels", 3)
    assert set(data.left_out) <= {"category_path"} and not set(data.left_out) & {arm.name for arm in plan.arms()}


def test_the_sid_methods_has_every_rival():
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
    ("changes", "words"),
    [
        ({"arms": {"a": {"sids": {"method": "random"}, "classical": True}}}, "exactly one"),
        ({"arms": {"item_knn": {"sids": {"method": "random"}}}}, "names of the classical baselines"),
        ({"arms": SUITE["arms"] | {"both": {"fusion": "classical"}}}, "must be a SID arm"),
        ({"claims": ["nobody"]}, "nobody.*is no arm"),
        ({"seeds": [1, 1]}, "twice"),
        ({"arms": {"ours": {"tokenizer": {"seed": 3}}}}, "given by the bench"),
        ({"trials": [{"model": {"droput": 0.1}}]}, "droput"),
    ],
)
def test_a_wrong_suite_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        build(SuiteConfig, SUITE | {"baselines": []} | changes, source="suite.yaml", section="")


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match="amazon_beauty"):
        load_dataset("amazon")


# --- the rules


def test_the_best_trial_on_valid_wins_and_the_first_of_equals():
    assert choose_trial({0: 0.10, 1: 0.12, 2: 0.11}) == 1
    assert choose_trial({0: 0.12, 1: 0.12}) == 0


def test_within_five_percent_of_the_best_or_named():
    screened = {"best": 0.100, "edge": 0.095, "below": 0.0949, "claimed": 0.010}
    assert choose_finalists(screened, 0.05, {"claimed", "elsewhere"}) == ["best", "edge", "claimed"]
    assert choose_finalists({}, 0.05, {"claimed"}) == []


def test_differences_pair_the_seeds_that_both_have():
    users = 400
    hit, miss = Ranks(np.zeros(users, int), np.ones(users, int)), Ranks(np.full(users, 99), np.ones(users, int))
    ranks = {"full": {0: hit, 1: hit, 2: miss}, "screened": {0: miss}, "floor": {None: miss}, "other": {7: hit}}
    rows = {(row["arm"], row["baseline"]): row for row in difference_rows(ranks, ["full", "floor"], "test") if row["metric"] == "HR@10"}
    assert rows["screened", "full"]["mean"] == -1 and rows["screened", "full"]["seeds"] == 1
    assert rows["floor", "full"]["mean"] == pytest.approx(-2 / 3) and rows["floor", "full"]["seeds"] == 3
    assert ("other", "full") not in rows and rows["other", "floor"]["mean"] == 1
    assert rows["screened", "floor"]["mean"] == 0 and not rows["screened", "floor"]["exceeds_noise"]
    assert rows["other", "floor"]["exceeds_noise"] and rows["other", "floor"]["p_holm"] > rows["other", "floor"]["p"]


# --- jobs, in this process


def test_the_trial_is_chosen_by_valid_alone(dataset, tmp_path):
    """Permuted test labels change the test ranks and nothing that is looked at before."""
    figures, tests = [], []
    for permuted in (False, True):
        plan, bench = plan_for(dataset, tmp_path / f"work{permuted}")
        if permuted:
            bench.split.test[:] = np.random.default_rng(0).permutation(bench.split.test)
        screen(plan, bench, "balanced_rq", "random")
        choice = judge(plan)
        rows, _ = collect(plan, choice.trials, ("valid",))
        figures.append((choice, [(row["arm"], row["valid"], row["trial"]) for row in rows]))
        arm = next(arm for arm in plan.arms() if arm.name == "balanced_rq")
        tests.append(read_ranks(ranks_path(plan.fit(arm, 0, 0).folder, arm.name, "test"), "test").ranks.above.tolist())
    assert figures[0] == figures[1]
    assert tests[0] != tests[1]


def test_without_test_its_ranks_are_not_opened(dataset, tmp_path):
    plan, bench = plan_for(dataset, tmp_path / "work")
    screen(plan, bench, "random")
    for path in (plan.work / "jobs").rglob("*.test.parquet"):
        path.unlink()
    (row,), _ = collect(plan, judge(plan).trials, ("valid",))
    assert row["metrics"] == {} and row["valid"]["NDCG@10"]["mean"] > 0
    for path in (plan.work / "jobs").rglob("figures.json"):
        assert "test" not in json.loads(path.read_text()).get("random", {})
    with pytest.raises(MmsidError, match=r"test\.parquet"):
        collect(plan, judge(plan).trials, ("valid", "test"))


def test_seeds_vary_tokenizer_and_recommender_but_published_sids_stay(dataset, tmp_path):
    plan, bench = plan_for(dataset, tmp_path / "work")
    by_name = {arm.name: arm for arm in plan.arms()}
    assert list(by_name) == ["random", "balanced_rq", "published_someone"]
    made, imported = by_name["balanced_rq"], by_name["published_someone"]
    assert plan.sids(made, 0).folder != plan.sids(made, 1).folder
    assert plan.sids(imported, 0).folder == plan.sids(imported, 1).folder
    assert plan.fit(imported, 0, 0).folder != plan.fit(imported, 0, 1).folder
    screen(plan, bench, "published_someone")
    (row,), _ = collect(plan, judge(plan).trials, ("valid", "test"))
    assert row["collisions"] == 0 and "no tokenizer seed" in row["varies"] and len(row["intrinsic"]["perplexity"]) == 2


def test_fusion_and_sasrec_are_screened_in_their_own_families(dataset, tmp_path):
    arms = SUITE["arms"] | {"sasrec": {"sasrec": True}, "fused": {"fusion": "published_someone"}}
    plan, _ = plan_for(dataset, tmp_path, arms=arms, claims=["fused"])
    by_name = {arm.name: arm for arm in plan.arms()}
    assert set(by_name) == {"random", "balanced_rq", "published_someone", "sasrec"}
    fit = plan.fit(by_name["published_someone"], 0, 0)
    assert (fit.fusion, fit.classical) == ("fused", plan.classical().folder) and set(fit.needs) == {fit.sids, fit.classical}
    assert plan.fit(by_name["sasrec"], 0, 0).needs == ()
    assert [row.family for row in plan.rows(by_name["published_someone"])] == ["sid", "fusion"]
    assert by_name["sasrec"].family == "classical"


def test_a_job_is_another_job_when_what_made_it_changes(dataset, tmp_path):
    def folder(plan: Plan) -> str:
        return plan.fit(plan.arms()[0], 0, 0).folder.name

    plan, _ = plan_for(dataset, tmp_path)
    known = folder(plan)
    assert folder(Plan(dataset, plan.suite, plan.catalog_sha256, tmp_path / "elsewhere")) == known
    assert folder(Plan(dataset, plan.suite, "another", tmp_path)) != known
    assert folder(plan_for(dataset, tmp_path, schedule=SUITE["schedule"] | {"epochs": 3})[0]) != known
    assert folder(plan_for(dataset.model_copy(update={"codebook_size": 9}), tmp_path)[0]) != known


def test_arms_that_cannot_be_made_are_named(dataset, tmp_path):
    bare = dataset.model_copy(update={"published": None, "left_out": {"random": "for a reason"}})
    plan, _ = plan_for(bare, tmp_path)
    assert [arm.name for arm in plan.arms()] == ["balanced_rq"]
    assert plan.left_out() == {"random": "for a reason", "published": "the data set has no published SIDs"}


# --- processes


class Sum:
    """A job of the pool's own test: `number` -1 kills its process, -2 fails."""

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
    """When each finished job was finished; drafts, which get their manifest a moment before their name, do not count."""
    finished = [path for path in sorted(work.rglob("manifest.json")) if not any(part.endswith(".draft") for part in path.parts)]
    return {str(path): path.stat().st_mtime_ns for path in finished}


@pytest.mark.slow
def test_the_command_resumes_after_a_kill_reports_a_failing_arm_and_then_does_nothing(dataset, tmp_path):
    grounded = {"sids": {"method": "random"}, "recommender": "hybrid"}
    sound = SUITE | {"arms": SUITE["arms"] | {"hybrid": grounded, "sasrec": {"sasrec": True}, "fused": {"fusion": "random"}}}
    suite = sound | {"arms": sound["arms"] | {"broken": {"sids": {"method": "random", "num_levels": 1, "codebook_size": 2}}}}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(json.loads(dataset.model_dump_json(exclude={"name"}, exclude_none=True))))
    command = [sys.executable, "-m", "mmsid.cli", "bench", "--dataset", "tiny.yaml", "--suite", "rules.yaml", "--results", "out"]
    # killed as soon as one job is finished, workers and all
    first = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    work = tmp_path / "runs" / "bench" / "tiny" / "rules"
    until = time.monotonic() + 300
    while not (kept := stamps(work)) and time.monotonic() < until and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert kept and not (tmp_path / "out").exists()

    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert second.returncode == 1 and "broken (sids, seed 0)" in second.stderr and "2 codes name 2" in second.stderr
    after = stamps(work)
    assert kept.items() <= after.items() and len(after) > len(kept)
    text = (tmp_path / "out" / "tiny.json").read_text()
    written = json.loads(text)
    assert set(written) == {"dataset", "arms", "differences"}
    assert "item0" not in text and '"u1"' not in text
    rows = {row["arm"]: row for row in written["arms"]}
    assert set(rows) == {*CLASSICAL_NAMES, "random", "balanced_rq", "published_someone", "hybrid", "sasrec", "fused"}
    assert {name for name, row in rows.items() if row["family"] == "fusion"} == {"hybrid", "fused"}
    assert rows["balanced_rq"]["seeds"] == [0, 1] and rows["balanced_rq"]["metrics"]["NDCG@10"]["std"] >= 0
    assert rows["hybrid_knn"]["family"] == "classical" and rows["random"]["family"] == "sid"
    assert written["dataset"]["not_run"][0]["arm"] == "broken"
    table = (tmp_path / "out" / "tiny.md").read_text()
    assert table.index("| hybrid_knn |") < table.index("| popularity |") < table.index("| balanced_rq | sid |")
    assert "## Not run" in table and "p (Holm)" in table

    options = BenchOptions(suite_name="rules", results=tmp_path / "out", runs=tmp_path / "runs")
    shutil.copy(tmp_path / "out" / "tiny.json", tmp_path / "before.json")
    path = run(load_dataset(str(tmp_path / "tiny.yaml")), SuiteConfig(**sound), options)
    assert stamps(work) == after
    again = json.loads(path.read_text())
    assert again["arms"] == written["arms"] and again["differences"] == written["differences"]


def test_the_finest_category_is_one_that_most_items_have():
    """The last depth of a ragged tree belongs to two items, which any codes tell apart: it says nothing."""
    records = [
        {"depth": depth, "items": items, "v_measure": value}
        for depth, items, values in ((1, 100, (0.2, 0.3)), (2, 60, (0.5, 0.6)), (3, 50, (0.9, 0.9)), (4, 2, (1.0, 1.0)))
        for value in values
    ]
    assert finest_v_measures(records) == [0.5, 0.6] and finest_v_measures([]) is None
