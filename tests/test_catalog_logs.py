"""Forms of user logs: each is read with the right histories, or refused with the likely cause and a remedy; facts are noted and counted."""

import csv
import json
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsid.catalog import Catalog, CatalogConfig, SplitConfig, describe, read_catalog, split_histories, summary
from mmsid.config import build
from mmsid.errors import CatalogError

NAMES = ["i0", "i1", "i2", "i3"]
EVENTS = [("u", "i1", 20), ("v", "i2", 5), ("u", "i0", 10), ("u", "i2", 30), ("w", "i3", 7)]
HISTORIES = {"u": ["i0", "i1", "i2"], "v": ["i2"], "w": ["i3"]}
START = 1_760_000_000  # 2025-10-09, in seconds


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as text:
            lines = csv.DictWriter(text, list(rows[0]))
            lines.writeheader()
            lines.writerows(rows)
    return path


def read(folder: Path, log: list[dict], key: str = "events", kind: str = ".parquet", ids=NAMES, items=None, **more) -> Catalog:
    items = items or [{"item_id": name, "title": f"the {name} thing"} for name in ids]
    data = {"items": write(folder / "items.parquet", items), key: write(folder / f"log{kind}", log)} | more
    return read_catalog(build(CatalogConfig, data, source="test", section="catalog"))


def refusal(*args, **more) -> str:
    with pytest.raises(CatalogError) as caught:
        read(*args, **more)
    assert ";" in str(caught.value), "an error ends with its remedy"
    return str(caught.value)


def histories(catalog: Catalog) -> dict[str, list[str]]:
    return {user.user_id: [catalog.items[row].item_id for row in user.rows] for user in catalog.histories}


def times(catalog: Catalog) -> dict[str, list[float]]:
    return {user.user_id: user.timestamps.tolist() for user in catalog.histories}


def events(columns=("user_id", "item_id", "timestamp"), spell=lambda time: time, found=EVENTS) -> list[dict]:
    return [dict(zip(columns, (user, item, spell(time)), strict=True)) for user, item, time in found]


def noted(catalog: Catalog, *parts: str) -> None:
    assert any(all(part in note for part in parts) for note in catalog.notes), catalog.notes
    assert all(note in summary(describe(catalog)) for note in catalog.notes)


# column names


@pytest.mark.parametrize(
    "columns",
    [
        ("user_id:token", "item_id:token", "timestamp:float"),
        ("userId", "movieId", "timestamp"),
        ("visitorid", "itemid", "timestamp"),
        ("reviewerID", "asin", "unixReviewTime"),
        ("user_id", "parent_asin", "timestamp"),
        ("UserID", "ProductID", "event_time"),
        ("uid", "iid", "ts"),
        ("user", "item", "time"),
        ("customer_id", "article_id", "t_dat:float"),
    ],
)
def test_common_column_names_are_found_and_noted(tmp_path, columns):
    if "t_dat:float" in columns:
        assert "no column 'timestamp' (catalog.fields.event_time)" in refusal(tmp_path, events(columns))
        return
    catalog = read(tmp_path, events(columns), kind=".csv")
    assert histories(catalog) == HISTORIES and times(catalog)["u"] == [10, 20, 30]
    for name, default in zip(columns, ("user_id", "item_id", "timestamp"), strict=True):
        assert any(f"column {name!r} is used as" in note for note in catalog.notes) == (name != default)


def test_a_column_that_is_called_like_the_items_ids_is_preferred(tmp_path):
    log = [row | {"sku": row.pop("item_id"), "product_id": "x"} for row in events()]
    catalog = read(tmp_path, log, items=[{"sku": name, "title": name} for name in NAMES], fields={"item_id": "sku"})
    assert histories(catalog) == HISTORIES
    noted(catalog, "not read: product_id")


def test_an_ambiguous_column_is_refused_with_its_candidates(tmp_path):
    message = refusal(tmp_path, [row | {"movieId": 1, "trackId": 2} for row in events(("user_id", "x", "timestamp"))])
    assert "'movieId' or 'trackId' may be meant" in message and "set catalog.fields.event_item" in message


def test_a_column_that_the_user_sets_must_exist_even_if_a_common_name_is_there(tmp_path):
    message = refusal(tmp_path, events(("userId", "item_id", "timestamp")), fields={"user_id": "person"})
    assert "no column 'person' (catalog.fields.user_id)" in message and "found: userId, item_id, timestamp" in message


def test_unread_columns_and_unweighted_types_are_named(tmp_path):
    log = [row | {"event": "view" if row["item_id"] != "i0" else "buy", "rating": 3.0, "shop": "x"} for row in events()]
    catalog = read(tmp_path, log)
    noted(catalog, "not read: rating, shop", "catalog.fields.event_weight: rating")
    noted(catalog, "all 2 types count alike (view 4, buy 1)", "catalog.event_types")
    weighted = read(tmp_path, log, event_types={"view": 1, "buy": 3})
    assert {user.user_id: user.weights.tolist() for user in weighted.histories}["u"] == [3, 1, 1]
    noted(weighted, "column 'event' is used as catalog.fields.event_type")


# the form of the table


def test_events_under_sequences_are_read_as_events_and_the_other_way_round(tmp_path):
    as_events = read(tmp_path, events(), key="sequences")
    assert histories(as_events) == HISTORIES and times(as_events)["u"] == [10, 20, 30]
    noted(as_events, "catalog.sequences holds one row per event")
    as_sequences = read(tmp_path, [{"user_id": user, "items": items} for user, items in HISTORIES.items()])
    assert histories(as_sequences) == HISTORIES
    noted(as_sequences, "catalog.events holds one row per user")
    message = refusal(tmp_path, events(("user_id", "item_id", "place")), key="sequences")
    assert "catalog.sequences needs one row per user" in message
    message = refusal(tmp_path, events(("user_id", "item_id", "place")))
    assert "no column 'timestamp'" in message and "catalog.events needs one row per event" in message


# times


@pytest.mark.parametrize(
    ("spell", "kind"),
    [
        (lambda t: START + t, "seconds"),
        (lambda t: float(START + t), "seconds"),
        (lambda t: (START + t) * 1000, "milliseconds"),
        (lambda t: (START + t) * 10**6, "microseconds"),
        (lambda t: (START + t) * 10**9, "nanoseconds"),
        (lambda t: str((START + t) * 1000), "milliseconds"),
        (lambda t: datetime.fromtimestamp(START + t, UTC), None),
        (lambda t: datetime.fromtimestamp(START + t, UTC).isoformat(), None),
        (lambda t: datetime.fromtimestamp(START + t, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"), None),
        (lambda t: datetime.fromtimestamp(START + t, UTC).strftime("%Y/%m/%d %H:%M:%S"), None),
        (lambda t: datetime.fromtimestamp(START + t, UTC).strftime("%d.%m.%Y %H:%M:%S"), None),
        (lambda t: datetime.fromtimestamp(START + t, UTC).strftime("%Y-%m-%d %H:%M:%S") + (" +00:00" if t > 10 else ""), None),
    ],
)
def test_times_of_any_unit_and_notation_become_seconds(tmp_path, spell, kind):
    catalog = read(tmp_path, events(spell=spell))
    assert histories(catalog) == HISTORIES and times(catalog)["u"] == [START + 10, START + 20, START + 30]
    if kind:
        noted(catalog, f"'timestamp': {kind} since 1970 (2025-10-09 to 2025-10-09)")
        assert any("converted" in note for note in catalog.notes) == (kind != "seconds")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["09 13, 2009", "10 13, 2009"], [1252800000, 1255392000]),  # Amazon's reviewTime
        (["12/31/2009", "01/02/2010"], [1262217600, 1262390400]),
        (["31/12/2009", "01/02/2010"], [1262217600, 1264982400]),
    ],
)
def test_dates_in_other_notations_are_read(tmp_path, texts, expected):
    catalog = read(tmp_path, events(found=[("u", "i0", texts[0]), ("u", "i1", texts[1])]), kind=".csv")
    assert times(catalog) == {"u": expected}


def test_a_date_that_may_be_read_in_two_ways_is_refused(tmp_path):
    assert "month/day/year or day/month/year" in refusal(tmp_path, events(found=[("u", "i0", "01/02/2010")]))


def test_seconds_and_milliseconds_in_one_column_are_converted_and_counted(tmp_path):
    mixed = events(spell=lambda t: (START + t) * (1000 if t == 20 else 1))
    catalog = read(tmp_path, mixed)
    assert histories(catalog) == HISTORIES and times(catalog)["u"] == [START + 10, START + 20, START + 30]
    assert catalog.problems["timestamp_of_other_unit"] == 1
    noted(catalog, "seconds since 1970", "1 of 5 values in another unit")


@pytest.mark.parametrize("spell", [lambda t: t, lambda t: 20260000 + t, lambda t: 10 ** (t // 2), lambda t: -t])
def test_numbers_that_are_no_times_stay_as_they_are(tmp_path, spell):
    catalog = read(tmp_path, events(spell=spell))
    assert sorted(times(catalog)["u"]) == times(catalog)["u"] == sorted([spell(10), spell(20), spell(30)])
    assert not catalog.problems["timestamp_of_other_unit"] and not any("since 1970" in note for note in catalog.notes)


# duplicates, merging


def test_duplicate_events_stay_and_are_counted(tmp_path):
    catalog = read(tmp_path, events(found=[*EVENTS, EVENTS[0], EVENTS[0], ("u", "i1", 21)]))
    assert histories(catalog)["u"] == ["i0", "i1", "i1", "i1", "i1", "i2"] and catalog.problems["duplicate_event"] == 2


def test_rows_of_one_user_are_merged_whatever_their_order(tmp_path):
    rows = [
        {"user_id": "u", "items": ["i2", "i3"], "times": [20, 40]},
        {"user_id": "v", "items": ["i3"], "times": [1]},
        {"user_id": "u", "items": ["i0", "i1"], "times": [10, 30]},
        {"user_id": "u", "items": ["i0", "i1"], "times": [10, 30]},
    ]
    timed = read(tmp_path, rows, key="sequences", fields={"timestamps": "times"})
    assert histories(timed) == {"u": ["i0", "i2", "i1", "i3"], "v": ["i3"]} and times(timed)["u"] == [10, 20, 30, 40]
    assert timed.problems["user_in_several_rows"] == 1 and timed.problems["repeated_row"] == 1
    noted(timed, "1 users have several rows", "merged by time")
    plain = read(tmp_path, rows, key="sequences")
    assert histories(plain)["u"] in (["i0", "i1", "i2", "i3"], ["i2", "i3", "i0", "i1"])
    noted(plain, "joined in the order of their content")
    noted(plain, "not read: times (set catalog.fields.timestamps: times")
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        shuffled = [rows[row] for row in order]
        assert read(tmp_path, shuffled, key="sequences").sha256 == plain.sha256
        assert read(tmp_path, shuffled, key="sequences", fields={"timestamps": "times"}).sha256 == timed.sha256


# lists in texts


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("spell", "note"),
    [
        (" ".join, "white space"),
        (",".join, "','"),
        (", ".join, "','"),
        (";".join, "';'"),
        ("\t".join, "tabs"),
        ("|".join, None),
        (json.dumps, None),
        (repr, None),
        (lambda items: "[" + " ".join(map(repr, items)) + "]", None),  # as numpy prints it
        (lambda items: "[" + ", ".join(items) + "]", None),
        (lambda items: f"['{items[0]}'" + "".join(f'\n "{item}"' for item in items[1:]) + "]", None),
    ],
)
def test_item_lists_in_texts_are_split(tmp_path, kind, spell, note):
    log = [{"user_id": user, "items": spell(items), "times": " ".join("123"[: len(items)])} for user, items in HISTORIES.items()]
    catalog = read(tmp_path, log, key="sequences", kind=kind, fields={"timestamps": "times"})
    assert histories(catalog) == HISTORIES and times(catalog)["u"] == [1, 2, 3]
    if note:
        noted(catalog, f"the item ids are separated by {note}")
    else:
        assert not any("separated" in each for each in catalog.notes)


def test_ids_that_contain_a_separator_stay_whole(tmp_path):
    names = ["red shoe", "blue, shoe", "tea; green"]
    catalog = read(tmp_path, [{"user_id": "u", "items": "|".join(names)}], key="sequences", kind=".csv", ids=names)
    assert histories(catalog) == {"u": names}
    quoted = read(tmp_path, [{"user_id": "u", "items": repr(names)}], key="sequences", kind=".csv", ids=names)
    assert histories(quoted) == {"u": names}


@pytest.mark.parametrize("cell", ["['i0', 'i1'", "['it's', 'i1']", "[['i0'], ['i1']]", '[{"id": "i0"}]', "['i0' ... 'i3']"])
def test_a_broken_list_is_refused_with_its_row(tmp_path, cell):
    message = refusal(tmp_path, [{"user_id": "v", "items": "['i0']"}, {"user_id": "u", "items": cell}], key="sequences", kind=".csv")
    assert "row 2, field 'items': starts like JSON but is not valid JSON" in message


def test_lists_of_numbers_nulls_and_one_item_per_row_are_read(tmp_path):
    numbers = [{"user_id": 1, "items": [3, None, 1], "times": [5, 6, 7]}, {"user_id": 2, "items": [2], "times": [1]}]
    catalog = read(tmp_path, numbers, key="sequences", ids=["1", "2", "3"], fields={"timestamps": "times"})
    assert histories(catalog) == {"1": ["3", "1"], "2": ["2"]} and times(catalog)["1"] == [5, 7]
    assert catalog.problems["event_without_item"] == 1
    single = [{"user_id": 1, "items": 3, "times": 9}, {"user_id": 1, "items": 1, "times": 4}]
    assert histories(read(tmp_path, single, key="sequences", ids=["1", "2", "3"], fields={"timestamps": "times"})) == {"1": ["1", "3"]}


# ids


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["7", "8", "9"], ["7.0", "8.0", "9.00"]),
        (["7", "8", "9"], [7.0, 8.0, 9.0]),
        (["7", "8", "9"], ["0007", "0008", "9"]),
        (["7.0", "8.0", "9.0"], ["7", "8", "9"]),
        (["7", "8", "9"], [" 7", "8 ", "9"]),
        (["7", "8", "9"], [b"7", b"8", b"9"]),
        (["0007", "0008", "0009"], ["0007", "0008", "0009"]),
    ],
)
def test_ids_of_numbers_match_in_any_spelling(tmp_path, ours, theirs):
    catalog = read(tmp_path, events(found=[("u", theirs[0], 1), ("u", theirs[1], 2), ("v", theirs[2], 3)]), ids=ours)
    assert histories(catalog) == {"u": ours[:2], "v": ours[2:]}


def test_ids_matched_in_another_form_are_noted_and_exact_ones_come_first(tmp_path):
    catalog = read(tmp_path, events(found=[("u", "7.0", 1), ("u", "8", 2)]), ids=["7", "8"])
    noted(catalog, "1 ids were matched in another form, like '7.0' with the item '7'")
    both = read(tmp_path, events(found=[("u", "7.0", 1), ("u", "7", 2)]), ids=["7", "7.0"])
    assert histories(both) == {"u": ["7.0", "7"]} and not both.notes


def test_uuids_are_ids(tmp_path):
    one = uuid.UUID(int=5)
    pq.write_table(pa.table({"item_id": [str(one)], "title": ["x"]}), tmp_path / "items.parquet")
    ids = pa.array([one.bytes], pa.uuid())
    pq.write_table(pa.table({"user_id": ids, "item_id": ids, "timestamp": [1]}), tmp_path / "log.parquet")
    catalog = read_catalog(CatalogConfig(items=tmp_path / "items.parquet", events=tmp_path / "log.parquet"))
    assert histories(catalog) == {str(one): [str(one)]}


@pytest.mark.parametrize(
    ("ours", "theirs", "cause"),
    [
        (["Shoe-A", "Shoe-B", "Shoe-C"], ["shoe-a", "SHOE-B", "shoe-c"], "upper and lower case"),
        (["shoe a", "shoe b", "shoe c"], ["shoea", "shoe\u00a0b", "'shoe c'"], "white space, quotes"),
        (["0007", "0008", "0009"], ["7", "8", "9"], "leading zeros"),
        (["1234567890123", "1234567890124", "x"], ["1.23457E+12", "1.23457E+12", "1.23457E+12"], "rounded by a spreadsheet"),
        (["7", "8", "9"], ["item_7", "item_8", "item_9"], "begin with 'item_'"),
        (["ad7", "ad8", "ad9"], ["7", "8", "9"], "the items table begin with 'ad'"),
        (["a", "b", "c"], ["x", "y", "z"], "belongs to another catalogue"),
    ],
)
@pytest.mark.parametrize("key", ["events", "sequences"])
def test_a_log_of_unknown_items_is_refused_with_the_likely_cause(tmp_path, ours, theirs, cause, key):
    log = events(found=[("u", each, time) for time, each in enumerate(theirs)])
    log = log if key == "events" else [{"user_id": "u", "items": theirs}]
    message = refusal(tmp_path, log, key=key, ids=ours)
    assert cause in message and all(repr(each) in message for each in (*ours, *theirs))
    assert "none of 3 interactions" in message and f"field {'item_id' if key == 'events' else 'items'!r}" in message


def test_another_column_with_the_right_ids_is_named(tmp_path):
    log = [row | {"sku": f"s{row['item_id'][1:]}"} for row in events(found=[("u", f"q{k}", k) for k in range(4)])]
    items = [{"item_id": f"s{k}", "title": "x"} for k in range(4)]
    assert "column 'sku' of the same file holds ids of items; set catalog.fields.event_item: sku" in refusal(tmp_path, log, items=items)
    items = [{"item_id": f"row{k}", "sku": f"q{k}", "title": "x"} for k in range(4)]
    assert "column 'sku' of the items table; set catalog.fields.item_id: sku" in refusal(tmp_path, log, items=items)


@pytest.mark.parametrize("key", ["events", "sequences"])
def test_half_of_the_interactions_may_be_unknown_but_not_more(tmp_path, key):
    def log(unknown: int) -> list[dict]:
        found = ["i0", "i1", *(f"x{k}" for k in range(unknown))]
        return [{"user_id": "u", "items": found}] if key == "sequences" else events(found=[("u", each, 1) for each in found])

    assert read(tmp_path, log(2), key=key).problems["unknown_item"] == 2
    assert "only 2 of 5 interactions" in refusal(tmp_path, log(3), key=key)


def test_a_catalogue_cut_by_max_items_does_not_count_the_others_as_unknown(tmp_path):
    catalog = read(tmp_path, events(), max_items=1)
    assert len(catalog.items) == 1 and sum(len(user.rows) for user in catalog.histories) < 3 and not catalog.problems["unknown_item"]


@pytest.mark.parametrize("null", ["\\N", "NULL", "<NA>", "nan", ""])
def test_null_texts_of_users_types_and_times_are_missing(tmp_path, null):
    log = [{"user_id": "u", "item_id": "i0", "timestamp": "5", "event_type": "click"}]
    log += [log[0] | {name: null} for name in ("user_id", "timestamp", "event_type")]
    catalog = read(tmp_path, log, kind=".csv", event_types={"click": 1})
    assert histories(catalog) == {"u": ["i0"]}
    assert catalog.problems == {"event_without_user": 1, "event_without_time": 1, "event_without_type": 1}
    assert "empty, expected an id" in refusal(tmp_path, [{"user_id": null, "items": "i0"}], key="sequences", kind=".csv")


def test_an_item_may_be_called_none(tmp_path):
    assert histories(read(tmp_path, events(found=[("u", "None", 1)]), ids=["None", "a"])) == {"u": ["None"]}


# repeat purchases


def test_targets_that_cannot_be_ranked_are_said_with_a_remedy(tmp_path):
    log = events(found=[(f"u{k}", item, time) for k in range(4) for time, item in enumerate(["i0", "i1", "i2", "i0"])])
    catalog = read(tmp_path, log)
    split = split_histories(catalog, SplitConfig())
    assert split.target_seen_before("test").tolist() == [True] * 4 and split.target_seen_before("valid").tolist() == [False] * 4
    text = summary(describe(catalog, split))
    assert "4 of 4 test targets cannot be ranked" in text and "catalog.split.repeats: first" in text
    first = split_histories(catalog, SplitConfig(repeats="first"))
    assert not first.target_seen_before("test").any() and len(first.users("test")) == 4
    assert [catalog.items[row].item_id for row in first.before_test[0]] == ["i0", "i1"]
    assert "cannot be ranked" not in summary(describe(catalog, first))
    assert "repeats" not in SplitConfig().model_dump() and SplitConfig(repeats="first").model_dump()["repeats"] == "first"


def test_repeats_follow_their_weights_and_times(tmp_path):
    found = [("u", "i0", 1, 1.0), ("u", "i1", 2, 2.0), ("u", "i0", 3, 3.0), ("u", "i2", 4, 4.0), ("u", "i3", 5, 5.0)]
    catalog = read(tmp_path, [dict(zip(("user_id", "item_id", "timestamp", "weight"), each, strict=True)) for each in found])
    split = split_histories(catalog, SplitConfig(repeats="first"))
    assert split.train_weights[0].tolist() == [1, 2] and split.target_weights("test").tolist() == [5]
    by_time = split_histories(catalog, SplitConfig(method="time", repeats="first", valid_from=0.5, test_from=0.9))
    assert by_time.train_weights[0].tolist() == [1, 2] and by_time.target_weights("valid").tolist() == [4]
    assert len(catalog.histories.rows) == 5  # the histories keep all interactions
