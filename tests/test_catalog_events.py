"""Typed events: rows in any order give the same histories and weights, every format reads alike, and dropped rows are counted."""

import csv
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsid.catalog import CatalogConfig, Split, co_engagement, describe, read_catalog, split_histories, summary
from mmsid.catalog.config import SplitConfig
from mmsid.config import build
from mmsid.errors import CatalogError, ConfigError

ITEMS = [{"item_id": name, "title": f"the {name} thing"} for name in "abcd"]
TYPES = {"click": 1.0, "conversion": 2.5, "exposure": 0.0}
EVENTS = [  # user, item, time, type, weight
    ("u", "b", 30, "conversion", 2.0),
    ("u", "a", 10, "click", 1.0),
    ("u", "c", 20, "exposure", 1.0),
    ("u", "d", 40, "click", 0.5),
    ("v", "c", 5, "click", 1.0),
    ("v", "zzz", 6, "click", 1.0),
    ("w", "a", 7, "exposure", 1.0),
    ("x", "zzz", 8, "click", 1.0),
    ("u", "a", 50, "click", 1.0),
]
COLUMNS = ("user_id", "item_id", "timestamp", "event_type", "weight")


def rows(events=EVENTS, columns=COLUMNS) -> list[dict]:
    return [dict(zip(columns, event, strict=True)) for event in events]


def write(path: Path, found: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, found)) + "\n", encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as text:
            lines = csv.DictWriter(text, list(found[0]))
            lines.writeheader()
            lines.writerows(found)
    return path


def config(folder: Path, found: list[dict] | None = None, kind: str = ".parquet", **more) -> CatalogConfig:
    write(folder / "items.jsonl", ITEMS)
    events = write(folder / f"events{kind}", rows() if found is None else found)
    data = {"items": folder / "items.jsonl", "events": events, "event_types": TYPES} | more
    return build(CatalogConfig, data, source="test", section="catalog")


def refusal(config: CatalogConfig) -> str:
    with pytest.raises(CatalogError) as caught:
        read_catalog(config)
    return str(caught.value)


def histories(catalog) -> dict:
    return {
        user.user_id: ([catalog.items[row].item_id for row in user.rows], user.timestamps.tolist(), user.weights.tolist())
        for user in catalog.histories
    }


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".csv"])
def test_events_are_grouped_in_time_order_and_weighted_by_type_and_column(tmp_path, kind):
    catalog = read_catalog(config(tmp_path, kind=kind))
    assert histories(catalog) == {
        "u": (["a", "b", "d", "a"], [10, 30, 40, 50], [1.0, 5.0, 0.5, 1.0]),  # the exposure of c is left out; 2.5 x 2.0
        "v": (["c"], [5], [1.0]),
    }
    assert all(user.timestamps.dtype == np.int64 for user in catalog.histories)
    assert catalog.problems == {"event_of_weight_zero": 2, "unknown_item": 2, "user_without_items": 2, "repeated_item": 1}
    assert "with 5 interactions of total weight 8.5" in summary(describe(catalog))
    assert catalog.sha256 == read_catalog(config(tmp_path)).sha256  # all formats


def test_shuffled_rows_and_renamed_users_give_the_identical_catalogue(tmp_path):
    rng = np.random.default_rng(0)
    # few distinct times, so that most events tie with others of their user
    drawn = [
        (f"u{u}", "abcd"[i], int(t), str(rng.choice(["click", "conversion"])), 1.0) for u, i, t in rng.integers(0, [9, 4, 3], (200, 3))
    ]
    first = read_catalog(config(tmp_path, rows(drawn)))
    for _ in range(3):
        shuffled = [drawn[at] for at in rng.permutation(200)]
        again = read_catalog(config(tmp_path, rows([("renamed " + event[0], *event[1:]) for event in shuffled])))
        assert again.sha256 == first.sha256
        for one, other in zip(first.histories, again.histories, strict=True):
            assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("rows", "timestamps", "weights"))


def test_events_of_weight_one_equal_the_same_histories_as_sequences(tmp_path):
    clicks = [event for event in EVENTS if event[1] != "zzz"]
    as_events = config(tmp_path, rows(clicks, COLUMNS), event_types={}, fields={"event_weight": "none"})
    message = refusal(as_events)
    assert "no column 'none' (catalog.fields.event_weight)" in message and "user_id, item_id" in message
    plain = read_catalog(config(tmp_path, [{name: row[name] for name in COLUMNS[:4]} for row in rows(clicks)], event_types={}))
    users = {user: sorted((event[2], event[1]) for event in clicks if event[0] == user) for user in "uvw"}
    write(tmp_path / "sequences.jsonl", [{"user_id": u, "items": [i for _, i in e], "times": [t for t, _ in e]} for u, e in users.items()])
    fields = {"timestamps": "times"}
    sequences = read_catalog(CatalogConfig(items=tmp_path / "items.jsonl", sequences=tmp_path / "sequences.jsonl", fields=fields))
    assert plain.sha256 == sequences.sha256
    assert all(user.weights is None for user in plain.histories) and split_histories(plain, SplitConfig()).train_weights is None


def test_a_catalogue_without_events_keeps_its_hash_and_its_configuration(tmp_path):
    write(tmp_path / "items.jsonl", ITEMS)
    write(tmp_path / "sequences.jsonl", [{"user_id": "u", "items": ["a", "b", "a"], "times": [1, 2, 3]}])
    plain = CatalogConfig(items=tmp_path / "items.jsonl", sequences=tmp_path / "sequences.jsonl", fields={"timestamps": "times"})
    assert read_catalog(plain).sha256 == "893e40d29734c578bba3fce8d676f6cecbd5088528d2cc04bc20c4c77bbda177"
    assert not {"events", "event_types", "vectors"} & plain.model_dump().keys()  # the configurations of finished stages stay equal


def test_times_are_read_as_numbers_dates_and_texts_with_and_without_zone(tmp_path):
    moment = datetime(2026, 11, 28, 9, 30, 0, 250_000, UTC)
    spelled = {
        "number": moment.timestamp(),
        "time": moment,
        "utc": "2026-11-28T09:30:00.250Z",
        "zone": "2026-11-28 10:30:00.25+01:00",
        "naive": " 2026-11-28T09:30:00.25 ",
        "text": str(moment.timestamp()),
    }
    for name, value in spelled.items():
        found = read_catalog(config(tmp_path, rows([("u", "a", value, "click", 1.0)]), event_types={}))
        assert found.histories[0].timestamps.tolist() == [1795858200.25], name
    days = read_catalog(config(tmp_path, rows([("u", "a", "2026-11-28", "click", 1.0)]), kind=".csv", event_types={}))
    assert days.histories[0].timestamps.tolist() == [1795824000.0]


def test_rows_that_lack_a_part_are_counted_once_and_never_lost(tmp_path):
    lacking = [
        (None, "a", 1, "click", 1.0),
        (" ", None, 1, "click", 1.0),
        ("u", "", 1, "click", 1.0),
        ("u", "a", None, "click", 1.0),
        ("u", "a", 1, None, 1.0),
        ("u", "a", 1, "click", None),
        ("u", "a", 1, "exposure", 1.0),
        ("u", "zzz", 1, "click", 1.0),
        ("u", "a", 9, "click", 1.0),
    ]
    for kind in (".parquet", ".jsonl", ".csv"):
        catalog = read_catalog(config(tmp_path, rows(lacking), kind=kind))
        kept = sum(len(user.rows) for user in catalog.histories)
        codes = {code: count for code, count in catalog.problems.items() if "event" in code or code == "unknown_item"}
        assert codes == {
            "event_without_user": 2,
            "event_without_item": 1,
            "event_without_time": 1,
            "event_without_type": 1,
            "event_without_weight": 1,
            "event_of_weight_zero": 1,
            "unknown_item": 1,
        }
        assert kept + sum(codes.values()) == len(lacking)


def test_integer_ids_and_types_match_the_texts_of_the_items_table(tmp_path):
    write(tmp_path / "items.csv", [{"item_id": "1", "title": "one"}, {"item_id": "2", "title": "two"}])
    table = pa.table({"user": [7, 7], "ad": [1.0, 2.0], "at": [1, 2], "action": [0, 2]})
    pq.write_table(table, tmp_path / "log.parquet")
    fields = {"user_id": "user", "event_item": "ad", "event_time": "at", "event_type": "action"}
    catalog = read_catalog(
        CatalogConfig(items=tmp_path / "items.csv", events=tmp_path / "log.parquet", event_types={"0": 1, "2": 2.5}, fields=fields)
    )
    assert histories(catalog) == {"7": (["1", "2"], [1, 2], [1.0, 2.5])}


def test_faults_name_row_value_and_remedy(tmp_path):
    unlisted = refusal(config(tmp_path, rows([*EVENTS[:2], ("u", "a", 1, "view", 1.0)])))
    assert "row 3" in unlisted and "'view' is not listed" in unlisted and "click, conversion, exposure" in unlisted
    assert "weight is -1" in refusal(config(tmp_path, rows([("u", "a", 1, "click", -1.0)])))
    assert "no column 'timestamp'" in refusal(config(tmp_path, [{"user_id": "u", "item_id": "a", "event_type": "click"}]))
    assert "no column 'event_type'" in refusal(config(tmp_path, [{"user_id": "u", "item_id": "a", "timestamp": 1}]))
    strangers = refusal(config(tmp_path, rows([("u", "x1", 1, "click", 1.0)])))
    assert "'x1'" in strangers and "'a', 'b', 'c'" in strangers
    for kind in (".csv", ".jsonl"):
        moment = refusal(config(tmp_path, rows([("u", "a", "12", "click", 1.0), ("u", "a", "noon", "click", 1.0)]), kind=kind))
        assert "2, field 'timestamp': 'noon'" in moment
    mixed = refusal(config(tmp_path, rows([("u", "a", "12", "click", 1.0), ("u", "a", "2026-11-28", "click", 1.0)]), kind=".csv"))
    assert "row 2" in mixed and "'2026-11-28'" in mixed
    assert "holds list" in refusal(config(tmp_path, rows([(["u"], "a", 1, "click", 1.0)])))
    assert "holds bool" in refusal(config(tmp_path, rows([("u", "a", True, "click", 1.0)])))
    ragged = config(tmp_path, kind=".csv")
    ragged.events.write_text("user_id,item_id,timestamp,event_type,weight\nu,a,1\n", encoding="utf-8")
    assert "events.csv, row 1: 3 cells, expected 5" in refusal(ragged)
    ragged.events.write_text("user_id,item_id,timestamp,event_type,weight\n", encoding="utf-8")
    assert "holds no rows" in refusal(ragged)
    ragged.events.write_text("user_id,item_id,item_id,timestamp\nu,a,a,1\n", encoding="utf-8")
    assert "occurs twice" in refusal(ragged)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sequences": "s.parquet"}, "name one of them"),
        ({"event_types": {"click": -1}}, "event_types.click"),
        ({"event_types": {"exposure": 0}}, "no event is left"),
        ({"events": None}, "events is not"),
    ],
)
def test_contradicting_keys_are_refused(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **more)


def weighted_split(tmp_path, method="leave_one_out") -> Split:
    events = [("u", name, time, kind, 1.0) for time, (name, kind) in enumerate(zip("abcd", ["click", "conversion", "click", "conversion"]))]
    events += [("v", "a", 2, "click", 1.0)]
    return split_histories(read_catalog(config(tmp_path, rows(events))), SplitConfig(method=method, valid_from=0.5, test_from=0.9))


def test_weights_follow_their_events_through_both_splits(tmp_path):
    split = weighted_split(tmp_path)
    user = int(split.users("test")[0])
    assert split.train_weights[user].tolist() == [1.0, 2.5]
    assert split.target_weights("valid").tolist() == [1.0] and split.target_weights("test").tolist() == [2.5]
    assert split.valid_weight[1 - user] == 0.0 and split.train_weights[1 - user].tolist() == [1.0]
    assert [*map(len, split.fit_weights())] == [*map(len, split.fit_histories())]
    by_time = weighted_split(tmp_path, "time")
    assert by_time.train_weights[user].tolist() == [1.0, 2.5] and by_time.target_weights("test").tolist() == [2.5]
    with pytest.raises(ValueError, match="differ in length"):
        Split(split.train, split.valid, split.test, split.before_test, split.held_out, train_weights=[np.ones(1), np.ones(9)])


def test_co_engagement_of_a_pair_is_the_product_of_its_weights_over_the_distance():
    found = co_engagement([np.array([0, 1, 2]), np.array([0, 1])], 3, weights=[np.array([1.0, 2.5, 2.0]), np.array([1.0, 1.0])])
    assert found.toarray().tolist() == [[0, 3.5, 1], [3.5, 0, 5], [1, 5, 0]]  # 1 x 2.5 + 1 x 1; 2.5 x 2; 1 x 2 / 2
