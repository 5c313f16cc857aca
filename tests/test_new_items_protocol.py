"""New-item benchmark: which items are new, what may be fitted, and which users are in which group."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsid.artifacts import sha256
from mmsid.catalog import CatalogConfig, SplitConfig, read_catalog, split_histories
from mmsid.catalog.subset import with_train_histories, write_items
from mmsid.errors import CatalogError
from mmsid.recommend.bench.new_items.protocol import calendar_world, drawn_items, hidden_world

LEAVE_ONE_OUT = SplitConfig()


def write(
    folder, histories: dict[str, str], times: dict[str, list[int]] | None = None, items: str = "abcdefghij", ids=None
) -> CatalogConfig:
    """One item per letter, titled by it. A history is a string of letters; `ids` renames the letters."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = ids or {letter: letter for letter in items}
    pq.write_table(pa.table({"item_id": [ids[x] for x in items], "title": [f"title {x}" for x in items]}), folder / "items.parquet")
    table = {"user_id": list(histories), "items": [[ids[x] for x in history] for history in histories.values()]}
    if times is not None:
        table["timestamps"] = [times[user] for user in histories]
    pq.write_table(pa.table(table), folder / "sequences.parquet")
    fields = {"timestamps": "timestamps"} if times is not None else {}
    return CatalogConfig(items=folder / "items.parquet", sequences=folder / "sequences.parquet", fields=fields)


def letters(catalog, rows) -> str:
    return "".join(catalog.items[row].title[-1] if row >= 0 else "-" for row in np.atleast_1d(rows))


def by_user(catalog, histories) -> dict[str, str]:
    return {user.user_id: letters(catalog, rows) for user, rows in zip(catalog.histories, histories, strict=True)}


def hide(monkeypatch, chosen: str) -> None:
    """Let every draw hide these letters."""
    monkeypatch.setattr(
        "mmsid.recommend.bench.new_items.protocol.drawn_items",
        lambda items, share, draw: np.array([item.title[-1] in chosen for item in items]),
    )


def test_a_draw_depends_on_content_and_number_alone(tmp_path):
    plain = read_catalog(write(tmp_path / "plain", {"u": "abc"}))
    ids = {letter: f"x{99 - n}" for n, letter in enumerate("jihgfedcba")}
    renamed = read_catalog(write(tmp_path / "renamed", {"u": "abc"}, items="jihgfedcba", ids=ids))
    draws = [drawn_items(plain.items, 0.3, draw) for draw in range(4)]
    assert [letters(plain, np.flatnonzero(new)) for new in draws] == [
        letters(renamed, np.flatnonzero(drawn_items(renamed.items, 0.3, draw))) for draw in range(4)
    ]
    assert all(new.sum() == 3 for new in draws) and len({letters(plain, np.flatnonzero(new)) for new in draws}) > 1
    expected = sorted(plain.items, key=lambda item: sha256(f"1:{item.content_sha256}"))[:3]
    assert {item.item_id for item in expected} == set(letters(plain, np.flatnonzero(draws[1])))


def test_items_of_equal_content_are_hidden_together(tmp_path):
    rows = [{"item_id": f"i{n}", "title": f"title {n // 2}"} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    items = read_catalog(CatalogConfig(items=tmp_path / "items.parquet")).items
    for draw in range(5):
        titles = [item.title for item, new in zip(items, drawn_items(items, 0.3, draw), strict=True) if new]
        assert len(titles) == 6 and len(set(titles)) == 3
    with pytest.raises(CatalogError, match="same content"):
        drawn_items(items[:1], 0.5, 0)


def test_hidden_items_leave_train_and_valid_but_not_test_histories(tmp_path, monkeypatch):
    hide(monkeypatch, "xy")
    histories = {"one": "axbcd", "two": "abcxd", "three": "abcdx", "four": "xyabc", "five": "xaxbx", "six": "xyxab"}
    catalog = read_catalog(write(tmp_path, histories, items="abcdxy"))
    world = hidden_world(catalog, LEAVE_ONE_OUT, 0.1, 0)
    fitted = sorted((letters(catalog, rows), letters(catalog, valid)) for rows, valid in zip(world.fit.train, world.fit.valid, strict=True))
    # one: a(x)b|c|d, two: abc|x|d, three: abc|d|x, four: (xy)a|b|c, five: (x)a(x)|b|x, six: nothing known before its valid item
    assert fitted == [("a", "b"), ("a", "b"), ("ab", "c"), ("abc", "-"), ("abc", "d")]
    assert not any(world.new[rows].any() for rows in world.fit.train)
    assert by_user(catalog, world.whole.before_test) == {user: history[:-1] for user, history in histories.items()}
    assert by_user(catalog, world.whole.test) == {user: history[-1] for user, history in histories.items()}
    known = world.fit_known
    assert [letters(catalog, world.known[rows]) for rows in known.train] == [letters(catalog, rows) for rows in world.fit.train]
    assert max(map(max, known.train)) < len(world.known_items) == 4


def test_groups_are_new_rare_and_all(tmp_path, monkeypatch):
    hide(monkeypatch, "x")
    histories = {f"u{n}": "abgg" for n in range(4)}  # train: a, b
    histories |= {"new": "aggx", "rare": "acgc", "zero": "aggd", "common": "bgga"}
    catalog = read_catalog(write(tmp_path, histories, items="abcdgx"))
    world = hidden_world(catalog, LEAVE_ONE_OUT, 0.1, 0)
    users = [catalog.histories[user].user_id for user in world.whole.users("test")]
    groups = {name: {user for user, is_in in zip(users, member, strict=True) if is_in} for name, member in world.groups().items()}
    # g is the valid item of six users; its two train interactions make it rare
    assert groups["new"] == {"new"}
    assert groups["rare"] == {"rare", "u0", "u1", "u2", "u3"}
    assert groups["all"] == set(users) and len(users) == 8


def test_the_calendar_fits_before_the_cut_only(tmp_path):
    histories = {"one": "abcx", "two": "abdx", "three": "bcxa", "late": "xyab", "early": "abcd", "short": "ca"}
    times = {"one": [1, 2, 3, 8], "two": [1, 2, 3, 9], "three": [2, 3, 8, 9], "late": [8, 8, 9, 9], "early": [1, 2, 3, 4], "short": [5, 8]}
    catalog = read_catalog(write(tmp_path, histories, times, items="abcdxyz"))
    world = calendar_world(catalog, LEAVE_ONE_OUT, 0.6)  # 14 of 22 interactions are before time 8
    assert letters(catalog, np.flatnonzero(world.new)) in ("xy", "yx")  # z was never seen and counts as known
    fitted = sorted((letters(catalog, rows), letters(catalog, valid)) for rows, valid in zip(world.fit.train, world.fit.valid, strict=True))
    assert fitted == sorted([("ab", "c"), ("ab", "d"), ("b", "c"), ("abc", "d"), ("c", "-")])
    assert by_user(catalog, world.whole.test) == {"one": "x", "two": "x", "three": "x", "late": "-", "early": "-", "short": "a"}
    assert by_user(catalog, world.whole.before_test) | {"late": ""} == {
        "one": "abc", "two": "abd", "three": "bc", "late": "", "early": "abcd", "short": "c"
    }  # fmt: skip


def test_a_calendar_needs_timestamps_and_new_items(tmp_path):
    bare = read_catalog(write(tmp_path / "bare", {"u": "abc"}))
    with pytest.raises(CatalogError, match="no timestamps"):
        calendar_world(bare, LEAVE_ONE_OUT, 0.8)
    same = read_catalog(write(tmp_path / "same", {"u": "abab", "v": "abab"}, {"u": [1, 2, 3, 4], "v": [1, 2, 3, 4]}))
    with pytest.raises(CatalogError, match="no item is first seen"):
        calendar_world(same, LEAVE_ONE_OUT, 0.8)


def test_a_split_without_ranked_users_is_refused(tmp_path, monkeypatch):
    hide(monkeypatch, "abc")
    with pytest.raises(CatalogError, match="known valid item"):
        hidden_world(read_catalog(write(tmp_path, {"u": "abcd"})), LEAVE_ONE_OUT, 0.1, 0)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_a_part_of_a_catalogue_reads_as_before(tmp_path, suffix):
    rows = [{"ad": f"ad{n // 2}", "title": f"title {n // 2}, \u201cnew\u201d", "tags": ["red", f"t{n // 2}"]} for n in range(8)]
    path = tmp_path / f"items.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        lines = ["ad,title,tags", *(f'{row["ad"]},"{row["title"]}",{"|".join(row["tags"])}' for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    config = CatalogConfig(items=path, fields={"group_by": "ad", "attributes": ["tags"]}, max_items=3)
    part = write_items(config, ["ad1", "ad3"], tmp_path / "part")
    whole = {item.item_id: item for item in read_catalog(config.model_copy(update={"max_items": None})).items}
    assert {item.item_id: item for item in read_catalog(part).items} == {name: whole[name] for name in ("ad1", "ad3")}
    assert CatalogConfig.model_validate(part.model_dump()) == part


def test_written_histories_are_the_train_part_of_their_split(tmp_path):
    config = write(tmp_path, {"u": "abcd", "v": "dcba"}, {"u": [1, 2, 3, 4], "v": [1, 2, 3, 4]})
    catalog = read_catalog(config)
    rows = {item.title[-1]: row for row, item in enumerate(catalog.items)}
    given = [np.array([rows[x] for x in history], dtype=np.int64) for history in ("ab", "", "c")]
    written = with_train_histories(config, catalog, given, tmp_path / "known")
    read = read_catalog(written)
    assert sorted(letters(read, train) for train in split_histories(read, written.split).train) == ["ab", "c"]
