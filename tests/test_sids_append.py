"""Append by hand: who takes what, what never moves, and what the order of rows and of appends may change."""

import numpy as np
import pytest

from mmsid.errors import MmsidError
from mmsid.sids.append import append_codes

NEW = [-1, -1]


def append(raw, hashes, published, scores, prefixes=(), **options):
    """Two levels; `scores` (N, K) log pi of the last code under any prefix, `prefixes` the same candidates for every item."""
    sizes = options.pop("sizes", (3, 3))
    raw, published, scores = np.array(raw), np.array(published), np.array(scores, dtype=float)
    candidates = [((prefix,), -float(place)) for place, prefix in enumerate(prefixes)]
    return append_codes(
        options.pop("policy", "relocate"), raw, hashes, published, sizes, lambda rows, _: scores[rows], lambda row: candidates, **options
    ).tolist()


def test_a_free_raw_sid_is_taken_a_published_one_never_moves():
    # rows 0 and 1 are published, row 1 away from its raw codes; 2 wants a free SID; 3 wants what row 0 has, and next best code 2
    raw = [[0, 0], [0, 0], [1, 1], [0, 0]]
    published = [[0, 0], [0, 1], NEW, NEW]
    scores = [[0, 0, 0], [0, 0, 0], [0, 0, 0], [-0.1, -0.2, -3.0]]
    assert append(raw, ["a", "b", "c", "d"], published, scores) == [[0, 0], [0, 1], [1, 1], [0, 2]]


def test_of_several_that_want_a_free_sid_the_first_hash_gets_it():
    raw, published = [[2, 1], [2, 1], [2, 1]], [NEW, NEW, NEW]
    scores = [[-1.0, 0.0, -2.0], [-1.0, 0.0, -2.0], [-3.0, 0.0, -2.0]]
    assert append(raw, ["z", "m", "a"], published, scores) == [[2, 2], [2, 0], [2, 1]], "a has it, m its next best, z what is left"


def test_exact_duplicates_share_and_the_retired_are_not_given_again():
    raw = [[0, 0], [0, 0], [1, 1], [1, 1], [1, 2]]
    published = [[0, 2], NEW, NEW, NEW, NEW]  # row 1 has the content of row 0, row 3 that of row 2
    scores = np.zeros((5, 3)) - np.arange(3)
    codes = append(raw, ["a", "a", "b", "b", "c"], published, scores, retired=np.array([[1, 1], [1, 2]]))
    assert codes == [[0, 2], [0, 2], [1, 0], [1, 0], codes[4]] and codes[4][0] != 1, "prefix 1 is full with the retired and b"


def test_a_full_prefix_sends_to_the_next_best_with_room():
    published = [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1], [2, 2], NEW]
    raw = [*published[:6], [0, 1]]
    scores = np.zeros((7, 3))
    scores[6] = [-2.0, -1.0, -3.0]
    assert append(raw, list("abcdefg"), published, scores, prefixes=(0, 2, 1))[6] == [1, 1]
    assert append(raw, list("abcdefg"), published, scores)[6] == [1, 1], "all candidates full: the nearest prefix with room"


def test_refusals_and_the_policy_none():
    full = [[0, 0], [0, 1], NEW]
    with pytest.raises(MmsidError, match=r"2 of 2 are taken"):
        append([[0, 0]] * 3, list("abc"), full, np.zeros((3, 2)), sizes=(1, 2))
    assert append([[0, 0]] * 3, list("abc"), full, np.zeros((3, 2)), sizes=(1, 2), policy="none")[2] == [0, 0]
    with pytest.raises(MmsidError, match="suffix"):
        append([[0, 0]], ["a"], [NEW], np.zeros((1, 3)), policy="suffix")
    with pytest.raises(MmsidError, match="row 1 is NaN"):
        append([[0, 0]] * 2, ["a", "b"], [[0, 0], NEW], np.full((2, 3), np.nan))


def test_row_order_changes_nothing_and_two_appends_part_only_where_they_compete():
    rng = np.random.default_rng(0)
    count, sizes = 80, (4, 5, 6)
    raw = rng.integers(0, (2, 5, 6), (count, 3))
    hashes = [f"{rng.integers(0, 60):03}" for _ in range(count)]
    by_hash = {one: row for row, one in reversed(list(enumerate(hashes)))}
    raw = raw[[by_hash[one] for one in hashes]]
    log_pi = {one: np.log(rng.dirichlet(np.ones(6))) for one in by_hash}

    def run(rows, published):
        names = [hashes[row] for row in rows]
        return append_codes(
            "relocate", raw[rows], names, published, sizes, lambda asked, _: np.stack([log_pi[names[row]] for row in asked]), lambda row: []
        )

    order = rng.permutation(count)
    nobody = np.full((count, 3), -1)
    once = run(np.arange(count), nobody)
    assert np.array_equal(once[order], run(order, nobody))
    assert len(np.unique(once, axis=0)) == len(by_hash)
    first = np.flatnonzero(np.arange(count) % 2 == 0)
    published = nobody.copy()
    published[first] = run(first, nobody[first])
    twice = run(np.arange(count), published)
    assert np.array_equal(twice[first], published[first]), "nothing published moves"
    assert len(np.unique(twice, axis=0)) == len(by_hash)
    alone = np.array([sum(np.array_equal(raw[row], raw[other]) for other in by_hash.values()) == 1 for row in range(count)])
    undisturbed = alone & (once == raw).all(1) & (twice == raw).all(1)
    assert undisturbed.sum() >= 0.8 * alone.sum() > 0, "whose raw SID nobody else wants has it, bar a few that a displaced item met"
