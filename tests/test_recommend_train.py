"""The stage train_recommender on a tiny catalogue: files written, resumption, and independence of row order and ids."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmsid import Recommender
from mmsid.artifacts import read_manifest, verify_folder, write_tensors
from mmsid.catalog import read_catalog, split_histories
from mmsid.errors import ArtifactError, ConfigError
from mmsid.recommend import train
from mmsid.recommend.classical import classical_baselines, history_weights, item_similarity
from mmsid.recommend.train import TrainRecommenderConfig, quick_recommender
from mmsid.sids.table import SidTable

ITEMS, USERS = 40, 90
SMALL = {"d_model": 16, "heads": 2, "hidden": 16, "layers": 1}
BRIEF = {"epochs": 3, "batch_size": 32, "lr": 0.02}


def write_catalogue(folder, order_seed: int | None = None) -> dict[str, int]:
    """Write a catalogue with 4 groups of items; a user's history cycles through one group. Returns id -> content number."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    histories = []
    for user in range(USERS):
        group, start, length = user % 4, int(rng.integers(10)), int(rng.integers(4, 8))
        histories.append([group * 10 + (start + step) % 10 for step in range(length)])
    shuffle = np.random.default_rng(order_seed)
    names = {number: f"item{number:03d}" if order_seed is None else f"x{shuffle.integers(1 << 40):013d}" for number in range(ITEMS)}
    rows = np.arange(ITEMS) if order_seed is None else shuffle.permutation(ITEMS)
    user_order = np.arange(USERS) if order_seed is None else shuffle.permutation(USERS)
    words = ["alpha", "beta", "gamma", "delta"]
    items = [{"item_id": names[n], "title": f"thing {n} {words[n // 10]}", "description": f"a {words[n // 10]} thing"} for n in rows]
    users = [{"user_id": f"u{place}", "items": [names[n] for n in histories[user]]} for place, user in enumerate(user_order)]
    pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    pq.write_table(pa.Table.from_pylist(users), folder / "sequences.parquet")
    return {names[number]: number for number in range(ITEMS)}


def write_sids(path, numbers: dict[str, int], seed: int = 0):
    codes = np.random.default_rng(seed).permutation(64)[:ITEMS]
    chosen = np.array([codes[number] for number in numbers.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    SidTable.from_codes(list(numbers), np.stack([chosen // 8, chosen % 8], 1), (8, 8)).save(path)
    return path


def config_for(folder, **changes) -> TrainRecommenderConfig:
    catalog = {"items": folder / "items.parquet", "sequences": folder / "sequences.parquet"}
    settings = {
        "out": folder / "out",
        "catalog": catalog,
        "model": SMALL,
        "schedule": BRIEF,
        "variants": {"random": folder / "random.parquet"},
        "recommender": False,
    }
    return TrainRecommenderConfig(**(settings | changes))


def figures(folder) -> dict:
    return {row["arm"]: (row["metrics"], row["valid"]) for row in json.loads((folder / "metrics.json").read_text())["arms"]}


@pytest.fixture
def catalogue(tmp_path):
    folder = tmp_path / "data"
    numbers = write_catalogue(folder)
    write_sids(folder / "random.parquet", numbers)
    return folder, numbers


def test_the_stage_writes_metrics_table_ranks_and_differences(catalogue, tmp_path):
    folder, numbers = catalogue
    write_sids(folder / "other" / "sids.parquet", numbers, seed=5)
    best = {"HR@1": 0.5, "HR@10": 0.9, "NDCG@10": 0.7}
    (tmp_path / "best_achievable.json").write_text(json.dumps({"test": {"expected": best}, "valid": {"expected": best}}))
    variants = {"random": folder / "random.parquet", "other": folder / "other"}
    out = train.run(config_for(folder, variants=variants, seeds=[0, 1], best_achievable=tmp_path / "best_achievable.json"))
    assert read_manifest(out, "train_recommender")["counts"]["test_users"] == USERS
    written = json.loads((out / "metrics.json").read_text())
    rows = {row["arm"]: row for row in written["arms"]}
    assert [row["family"] for row in written["arms"]] == ["classical"] * 4 + ["sid"] * 2 + ["best_achievable"]
    assert rows["random"]["seeds"] == [0, 1] and rows["random"]["collisions"] == 0
    assert 0 <= rows["random"]["metrics"]["NDCG@10"]["mean"] <= 1 and rows["random"]["metrics"]["NDCG@10"]["std"] >= 0
    assert rows["best achievable"]["metrics"]["NDCG@10"]["mean"] == 0.7
    assert rows["item_knn"]["metrics"]["HR@5"]["mean"] > 0.8 > rows["popularity"]["metrics"]["HR@5"]["mean"]
    assert {(row["arm"], row["baseline"]) for row in written["differences"]} >= {("other", "random"), ("item_knn", "random")}
    ranks = pq.read_table(out / "ranks" / "random" / "1.parquet")
    assert ranks.num_rows == 2 * USERS and set(ranks.column_names) == {"user_id", "part", "above", "tied"}
    table = (out / "ranking.md").read_text()
    assert "| best achievable | best_achievable |" in table and "95 % interval" in table


def test_targets_that_repeat_seen_items_are_said_before_training_and_in_the_table(catalogue):
    folder, numbers = catalogue
    ids = list(numbers)
    users = [{"user_id": f"u{user}", "items": [*ids[user : user + 4], ids[user]]} for user in range(30)]
    pq.write_table(pa.Table.from_pylist(users), folder / "sequences.parquet")
    message = "30 of 30 test targets cannot be ranked"
    with pytest.warns(UserWarning, match=message):
        out = train.run(config_for(folder, schedule={"epochs": 1}))
    assert message in (out / "ranking.md").read_text() and figures(out)["random"][0]["HR@10"]["mean"] == 0
    catalog = {"items": folder / "items.parquet", "sequences": folder / "sequences.parquet", "split": {"repeats": "first"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = train.run(config_for(folder, schedule={"epochs": 1}, catalog=catalog, out=folder / "first"))
    assert message not in (out / "ranking.md").read_text() and figures(out)["popularity"][0]["HR@10"]["mean"] > 0


def test_a_finished_seed_is_not_run_again(catalogue, monkeypatch):
    folder, _ = catalogue
    trained = []
    original = train.fit

    def counting(*args, seed, **keywords):
        if len(trained) == 1 and trained == [0]:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(seed)
        return original(*args, seed=seed, **keywords)

    monkeypatch.setattr(train, "fit", counting)
    config = config_for(folder, seeds=[0, 1], classical_baselines=False)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    assert not config.out.exists()
    resumed = figures(train.run(config))
    assert trained == [0, "killed", 1]
    shutil.rmtree(config.out)
    assert figures(train.run(config)) == resumed


def test_the_stage_keeps_a_hybrid_recommender_of_one_variant(catalogue, monkeypatch):
    folder, numbers = catalogue
    table = SidTable.load(write_sids(folder / "ours" / "sids.parquet", numbers, seed=5))
    embeddings = torch.nn.functional.normalize(torch.randn(ITEMS, 8, generator=torch.Generator().manual_seed(0)))
    write_tensors(folder / "ours" / "embeddings.safetensors", {"embeddings": embeddings})
    variants = {"random": folder / "random.parquet", "ours": folder / "ours"}
    config = config_for(folder, variants=variants, seeds=[0, 1], classical_baselines=False, recommender=True)
    out = train.run(config)
    rows = {row["arm"]: row for row in json.loads((out / "metrics.json").read_text())["arms"]}
    assert list(rows) == ["random", "ours", "hybrid (ours)"]
    row = rows["hybrid (ours)"]
    assert row["family"] == "sid" and row["seeds"] == [0] and row["collisions"] == 0 and row["metrics"]["HR@5"]["mean"] > 0.5
    assert "| hybrid (ours) | sid |" in (out / "ranking.md").read_text()
    recommender = Recommender.from_pretrained(out / "recommender", sids=folder / "ours")
    assert sorted(recommender.item_ids) == sorted(table.item_ids)
    assert np.allclose(recommender._state.sources.embedding.embeddings, embeddings[[table.row_of[item] for item in recommender.item_ids]])
    catalog, split_config = _read(folder)
    split = split_histories(catalog, split_config)
    users = split.users("test")
    found = recommender.recommend([[catalog.items[row].item_id for row in split.history(user, "test")] for user in users], k=5)
    hits = [catalog.items[split.test[user]].item_id in items for user, items in zip(users, found.item_ids, strict=True)]
    assert np.mean(hits) == pytest.approx(row["metrics"]["HR@5"]["mean"])
    with pytest.raises(ArtifactError, match=r"it is in .*recommender"):
        Recommender.from_pretrained(out)
    verify_folder(out)


def test_a_recommender_can_be_left_out(catalogue):
    folder, _ = catalogue
    config = config_for(folder, recommender=False)
    assert config.kept_variant is None and config.hybrid_variants == []
    assert config_for(folder, recommender="random").kept_variant == config_for(folder, recommender=True).kept_variant == "random"


def test_all_variants_can_have_the_hybrid_recommender(catalogue):
    folder, _ = catalogue
    out = train.run(config_for(folder, architecture="hybrid", classical_baselines=False, recommender=True))
    assert list(figures(out)) == ["random"] and figures(out)["random"][0]["HR@5"]["mean"] > 0.5
    assert Recommender.from_pretrained(out / "recommender", sids=folder / "random.parquet").recommend([[]]).status == ["empty_history"]


def test_permuting_rows_and_ids_changes_no_metric(catalogue, tmp_path):
    folder, _ = catalogue
    other = tmp_path / "shuffled"
    write_sids(other / "random.parquet", write_catalogue(other, order_seed=4))
    first, second = (figures(train.run(config_for(source))) for source in (folder, other))
    assert first == second


def test_invalid_configurations_raise_errors_with_the_key(catalogue):
    folder, _ = catalogue
    sids = folder / "random.parquet"
    for changes, message in (
        ({"variants": {"a/b": sids}}, "folder name"),
        ({"variants": {"item_knn": sids}}, "classical baseline"),
        ({"baseline": "missing"}, "not a variant"),
        ({"recommender": "missing"}, "recommender: 'missing' is not a variant.*recommender: false"),
        ({"seeds": [1, 1]}, "twice"),
        ({"model": {"d_model": 30, "heads": 4}}, "multiple of heads"),
    ):
        with pytest.raises(ConfigError, match=message):
            train.run(config_for(folder, **changes))


def test_the_quick_recommender_distinguishes_good_codes_from_one_shared_code(catalogue):
    folder, numbers = catalogue
    quick = quick_recommender(config_for(folder).catalog, epochs=12)
    chosen = np.array(list(numbers.values()))
    unique = SidTable.from_codes(list(numbers), np.stack([chosen // 10, chosen % 10], 1), (10, 10))
    shared = SidTable.from_codes(list(numbers), np.zeros((ITEMS, 2), int), (10, 10))
    good, bad = quick(unique), quick(shared)
    assert {"HR@50", "NDCG@10", "coverage@10"} <= set(good)
    assert good["NDCG@10"] > bad["NDCG@10"] + 0.1
    assert good == quick(unique)
    # chance among the unseen items
    lengths = [len(history) for history in split_histories(*_read(folder)).train]
    assert bad["HR@10"] == pytest.approx(np.mean([10 / (ITEMS - length) for length in lengths]))


def _read(folder):
    config = config_for(folder).catalog
    return read_catalog(config), config.split


def test_classical_similarities_by_hand():
    histories = [np.array([0, 1, 2]), np.array([0, 1])]
    similarity = item_similarity(histories, np.array([2, 2, 1])).toarray()
    assert similarity[0, 1] == pytest.approx(2 / 2) and similarity[0, 2] == pytest.approx(0.5 / np.sqrt(2)) and similarity[1, 1] == 0
    weights = history_weights([np.array([2, 0]), np.zeros(0, np.int64)], 3, 0.5).toarray()
    assert weights.tolist() == [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_classical_baselines_use_train_only(catalogue):
    """Other valid and test items change neither similarities nor counts; with the same parameters the scores are equal."""
    folder, _ = catalogue
    catalog, split_config = _read(folder)
    split = split_histories(catalog, split_config)
    history = [split.train[0]]
    before = {one.name: (one.parameters, one.score(history)) for one in classical_baselines(catalog.items, split)}
    counts = np.bincount(np.concatenate(split.train), minlength=ITEMS)
    assert before["popularity"][1][0].tolist() == counts.tolist()
    rng = np.random.default_rng(0)
    split.valid[:], split.test[:] = rng.integers(0, ITEMS, USERS), rng.integers(0, ITEMS, USERS)
    for one in classical_baselines(catalog.items, split):
        if one.parameters == before[one.name][0]:
            assert torch.equal(one.score(history), before[one.name][1])


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(catalogue, tmp_path):
    """Without dropout, splitting every batch over two processes changes only the order of additions."""
    folder, _ = catalogue
    model = SMALL | {"dropout": 0.0}
    alone = figures(train.run(config_for(folder, out=tmp_path / "alone", model=model, classical_baselines=False)))
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\n"
        "from mmsid.recommend.train import TrainRecommenderConfig, run\n"
        "from accelerate import PartialState\n"
        "assert PartialState(cpu=True).num_processes == 2\n"
        "run(TrainRecommenderConfig.model_validate_json(open(sys.argv[1]).read()))\n"
    )
    config = config_for(folder, out=tmp_path / "two", model=model, classical_baselines=False)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    subprocess.run(
        [*launch, str(script), str(tmp_path / "config.json")], check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    together = figures(tmp_path / "two")
    for one, two in zip(alone["random"], together["random"], strict=True):
        assert {name: value["mean"] for name, value in one.items()} == pytest.approx({n: v["mean"] for n, v in two.items()}, abs=0.02)
