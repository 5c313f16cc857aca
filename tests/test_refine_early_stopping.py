"""The monitored metric of early stopping by hand and on extreme tables, and the run log."""

import json

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from mmsid.catalog import Split
from mmsid.errors import ConfigError
from mmsid.refine.early_stopping import next_item_information, table_figures, transition_information
from mmsid.refine.tracking import RunLog, check_tracker


def test_transition_information_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 0]])
    counted, evaluated = np.array([[0, 2], [1, 3], [2, 0]]), np.array([[0, 3]])
    # code 1 follows in 2 of 3, (2 + 1) / (3 + 2) in general; after code 0 in (2 + 4 * .6) / (2 + 4)
    first = np.log((2 + 4 * 0.6) / 6) - np.log(0.6)
    assert transition_information(codes, counted, evaluated) == pytest.approx(first)
    # the reverse pair: 1 -> 0 once in 1
    back = np.log((1 + 4 * 0.4) / 5) - np.log(0.4)
    assert transition_information(codes, counted, np.array([[3, 0]])) == pytest.approx(back)


def test_collapsed_and_scrambled_codes_have_no_information():
    rng = np.random.default_rng(0)
    cluster = np.arange(120) // 20
    pairs = np.array([rng.choice(np.flatnonzero(cluster == rng.integers(6)), 2, replace=False) for _ in range(3000)])
    good = np.stack([cluster, np.arange(120) % 20], axis=1)
    value = lambda codes: transition_information(codes, pairs[:2000], pairs[2000:])  # noqa: E731
    assert value(np.zeros_like(good)) == 0.0
    assert value(good) > 1.2 and value(good[rng.permutation(120)]) < 0.2
    renamed = np.stack([rng.permutation(20)[good[:, level]] for level in range(2)], axis=1)
    assert value(renamed) == pytest.approx(value(good))


def test_the_metric_evaluates_the_step_to_the_valid_item_and_ignores_test():
    train = [np.array([0, 1]), np.array([2, 3]), np.array([1, 1])]
    split = Split(train, np.array([2, -1, 1]), np.array([3, 3, 3]), [], np.array([False, True, False]))
    codes = np.array([[0], [1], [0], [1]])
    # counted: 0 -> 1 of the only fit user with a pair; evaluated: 1 -> 2, without the user without valid item and the repeated item
    assert next_item_information(split)(codes) == transition_information(codes, np.array([[0, 1]]), np.array([[1, 2]]))
    no_valid = Split(train, np.array([-1, -1, -1]), np.array([3, 3, 3]), [], np.array([False, True, False]))
    assert next_item_information(no_valid) is None


def test_table_figures_by_hand():
    before, start = np.array([[0, 0], [0, 1], [1, 0]]), np.array([[1, 1], [0, 1], [1, 1]])
    figures = table_figures(np.array([[0, 0], [0, 0], [1, 0]]), 4, before, start)
    assert figures.pop("perplexity_1") == pytest.approx(np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))))
    assert figures == pytest.approx(
        {"collisions": 2 / 3, "perplexity_2": 1.0, "dead_codes_1": 2, "dead_codes_2": 3, "churn": 1 / 3, "moved_since_start": 1.0}
    )


class Kept(GeneralTracker):
    """A tracker that stores its calls."""

    name, requires_logging_directory, tracker = "kept", False, None

    def __init__(self):
        super().__init__()
        self.config, self.logged, self.finished = None, [], False

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_figures_reach_the_file_and_the_tracker(tmp_path):
    kept = Kept()
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"round": n, "kl": 9.0}) + "\n" for n in range(4)))
    log = RunLog(Accelerator(cpu=True), tmp_path, kept, {"lr": 0.1, "weights": {"a": 1.0}}, first=1)
    log({"round": 1, "kl": 0.5, "undone": False, "stopped": "enough"})
    log.close()
    assert [json.loads(line)["kl"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [9.0, 0.5], "rounds done again"
    assert kept.logged == [(1, {"kl": 0.5, "undone": 0.0})] and kept.config["lr"] == 0.1 and kept.finished


def test_a_missing_tracker_is_refused(monkeypatch):
    check_tracker(None)
    monkeypatch.setattr("mmsid.refine.tracking.is_tensorboard_available", lambda: False)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_tracker("tensorboard")
