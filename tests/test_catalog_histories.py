"""Columnar histories: the same users as a list of them, in the same order, after slicing, mapping, sorting, saving and opening."""

import hashlib
from dataclasses import astuple

import numpy as np
import pytest

from mmsid.catalog import Histories, UserHistory
from mmsid.catalog.histories import Slices
from mmsid.catalog.history_order import content_digests, engagement_of_duplicates, sorted_by_content, update_hash

ITEMS = 12
CONTENT = [hashlib.sha256(str(min(row, 8)).encode()).hexdigest() for row in range(ITEMS)]  # the last four items are copies


def users(seed: int = 0, count: int = 300, timed: bool = True, weighted: bool = True) -> list[UserHistory]:
    """Short histories of few items, so that many users have equal content, and some have equal rows, times and weights."""
    rng = np.random.default_rng(seed)
    found = []
    for user in rng.permutation(count):
        length = int(rng.integers(1, 4))
        times = np.sort(rng.integers(0, 3, length)) if timed else None
        weights = rng.choice([0.5, 1.0], length) if weighted else None
        found.append(UserHistory(f"u{user}", rng.integers(0, ITEMS, length), times, weights))
    return found


def plain(found) -> list[tuple]:
    return [tuple(each.tolist() if isinstance(each, np.ndarray) else each for each in astuple(user)) for user in found]


def test_columns_give_back_the_users_one_by_one_and_in_slices():
    listed = users()
    found = Histories.of(listed)
    assert plain(found) == plain(listed) and len(found) == 300 and found[-1].user_id == listed[-1].user_id
    assert plain([found[7]]) == plain([listed[7]])
    for part in (slice(5, 40), slice(None, 3), slice(290, 400), slice(None, None, -1), slice(9, 2), slice(1, 50, 7)):
        assert plain(found[part]) == plain(listed[part]), part
    order = np.random.default_rng(1).permutation(300)
    assert plain(found.take(order)) == plain([listed[user] for user in order])
    mask = order < 50
    assert plain(found.take(mask)) == plain([user for user, kept in zip(listed, mask, strict=True) if kept])
    assert [rows.tolist() for rows in found.pieces()] == [user.rows.tolist() for user in listed]
    assert found.user_of_row().tolist() == [number for number, user in enumerate(listed) for _ in user.rows]
    with pytest.raises(IndexError):
        found[300]


def test_no_users_are_false_and_can_be_sliced_mapped_sorted_and_iterated():
    empty = Histories.of([])
    assert not empty and plain(empty) == plain(empty[:5]) == []
    assert not empty.mapped(np.zeros(0, np.int64)) and not sorted_by_content(empty, []) and not len(empty.repeated())


def test_columns_that_do_not_belong_together_are_refused():
    found = Histories.of(users(count=3))
    with pytest.raises(ValueError, match="do not fit together"):
        Histories(found.user_ids, found.offsets, found.rows[1:])
    with pytest.raises(ValueError, match="1 of 2 users have timestamps"):
        Histories.of([*users(count=1), *users(count=1, timed=False)])


def test_mapping_drops_items_and_the_users_without_any():
    listed, new_row = users(), np.array([5, -1, 0, -1, 1, 2, -1, 3, 4, -1, -1, -1])
    keep = np.arange(300) % 3 > 0
    for kept_users in (None, keep):
        expected = []
        for number, user in enumerate(listed):
            kept = new_row[user.rows] >= 0
            if kept.any() and (kept_users is None or kept_users[number]):
                expected.append(UserHistory(user.user_id, new_row[user.rows][kept], user.timestamps[kept], user.weights[kept]))
        assert plain(Histories.of(listed).mapped(new_row, kept_users)) == plain(expected)
    everything = Histories.of(listed).mapped(np.arange(ITEMS)[::-1].copy())
    assert [user.rows.tolist() for user in everything] == [(ITEMS - 1 - user.rows).tolist() for user in listed]


def test_repeated_items_are_all_but_the_first_of_each_user():
    found = Histories.of([UserHistory("u", np.array([3, 1, 3, 3]), None), UserHistory("v", np.array([3, 1]), None)])
    assert found.repeated().tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize(("timed", "weighted"), [(True, True), (True, False), (False, False)])
def test_the_order_is_that_of_content_rows_times_weights_and_id(timed, weighted):
    listed = users(timed=timed, weighted=weighted)

    def key(user: UserHistory) -> tuple:
        content = hashlib.sha256("".join(CONTENT[row] for row in user.rows).encode()).hexdigest()
        times, weights = ([] if each is None else each.tolist() for each in (user.timestamps, user.weights))
        return content, user.rows.tolist(), times, weights, user.user_id

    assert plain(sorted_by_content(Histories.of(listed), CONTENT)) == plain(sorted(listed, key=key))
    assert len({key(user)[0] for user in listed}) < 250  # some tie


def test_digests_are_those_of_the_joined_hashes_of_any_length(monkeypatch):
    monkeypatch.setattr("mmsid.catalog.history_order._ROWS_AT_ONCE", 7)
    pieces = Slices(np.arange(ITEMS), np.array([3, 0, 5, 2]), np.array([9, 0, 6, 12]))
    for content in (CONTENT, ["a", "bc", *CONTENT[2:]]):
        expected = [hashlib.sha256("".join(content[row] for row in rows).encode()).digest() for rows in pieces]
        assert [each.tobytes() for each in content_digests(pieces, content)] == expected


def test_engagement_tells_copies_apart_by_the_histories_that_contain_them():
    listed = users()
    expected: dict[int, list[str]] = {row: [] for row in range(8, ITEMS)}
    for user in listed:
        content = hashlib.sha256("".join(CONTENT[row] for row in user.rows).encode()).hexdigest()
        for place, row in enumerate(user.rows.tolist()):
            if row >= 8:
                expected[row].append(f"{content}:{place}:{user.timestamps[place]}:{user.weights[place]}")
    hashed = {row: hashlib.sha256("\n".join(sorted(each)).encode()).hexdigest() for row, each in expected.items()}
    assert engagement_of_duplicates(Histories.of(listed), CONTENT) == hashed
    assert engagement_of_duplicates(Histories.of(listed), [f"{row:064d}" for row in range(ITEMS)]) == {}


@pytest.mark.parametrize(("count", "timed", "weighted"), [(5000, True, True), (3, True, False), (3, False, False), (0, False, False)])
def test_saved_histories_open_memory_mapped_and_equal(tmp_path, count, timed, weighted):
    found = Histories.of(users(count=count, timed=timed, weighted=weighted))
    found.save(tmp_path / "events")
    names = (
        {"offsets.npy", "rows.npy", "user_ids.arrow"} | ({"timestamps.npy"} if timed else set()) | ({"weights.npy"} if weighted else set())
    )
    assert {path.name for path in (tmp_path / "events").iterdir()} == names
    opened = Histories.open(tmp_path / "events")
    assert plain(opened) == plain(found)
    assert not count or not opened.rows.flags.writeable
    hashes = []
    for each in (found, opened):
        digest = hashlib.sha256()
        update_hash(digest, each)
        hashes.append(digest.hexdigest())
    assert hashes[0] == hashes[1]


def test_slices_are_a_sequence_of_views():
    pieces = Slices.of([np.array([1, 2]), np.array([], dtype=np.int64), np.array([3])])
    assert [rows.tolist() for rows in pieces] == [[1, 2], [], [3]] and pieces.lengths.tolist() == [2, 0, 1]
    assert [rows.tolist() for rows in pieces[::-1]] == [[3], [], [1, 2]] and pieces[-1].tolist() == [3]
    assert [rows.tolist() for rows in pieces.take(np.array([2, 0]))] == [[3], [1, 2]]
    assert np.concatenate(pieces).tolist() == [1, 2, 3]
    assert Slices.of(pieces) is pieces and len(Slices.of([])) == 0
    with pytest.raises(IndexError):
        pieces[3]
