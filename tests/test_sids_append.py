"""Append: which SIDs new items get, that published SIDs never change, and the effect of row order and of repeated appends."""

import numpy as np
import pytest

from mmsid.errors import MmsidError
from mmsid.sids.append import GrowingSids, append_codes

NEW = [-1, -1]


def append(raw, hashes, published, scores, prefixes=(), **options):
    """Append with two levels; `scores` (N, K) is log pi of the last code under any prefix, `prefixes` the candidates of every item."""
    sizes = options.pop("sizes", (3, 3))
    raw, published, scores = np.array(raw), np.array(published), np.array(scores, dtype=float)
    candidates = [((prefix,), -float(rank)) for rank, prefix in enumerate(prefixes)]
    return append_codes(
        options.pop("policy", "relocate"), raw, hashes, published, sizes, lambda rows, _: scores[rows], lambda row: candidates, **options
    ).tolist()


def test_new_items_take_free_raw_sids_and_published_sids_never_change():
    # Rows 0 and 1 are published, row 1 not at its raw codes. The raw SID of row 2 is free. Row 3 has the raw SID of row 0; its next best
    # code is 2.
    raw = [[0, 0], [0, 0], [1, 1], [0, 0]]
    published = [[0, 0], [0, 1], NEW, NEW]
    scores = [[0, 0, 0], [0, 0, 0], [0, 0, 0], [-0.1, -0.2, -3.0]]
    assert append(raw, ["a", "b", "c", "d"], published, scores) == [[0, 0], [0, 1], [1, 1], [0, 2]]


def test_the_first_content_hash_gets_a_contested_free_sid():
    raw, published = [[2, 1], [2, 1], [2, 1]], [NEW, NEW, NEW]
    scores = [[-1.0, 0.0, -2.0], [-1.0, 0.0, -2.0], [-3.0, 0.0, -2.0]]
    assert append(raw, ["z", "m", "a"], published, scores) == [[2, 2], [2, 0], [2, 1]], (
        "a gets it, m its next best code, z the last free code"
    )


def test_exact_duplicates_share_codes_and_retired_codes_are_not_reused():
    raw = [[0, 0], [0, 0], [1, 1], [1, 1], [1, 2]]
    published = [[0, 2], NEW, NEW, NEW, NEW]  # row 1 duplicates row 0, row 3 duplicates row 2
    scores = np.zeros((5, 3)) - np.arange(3)
    codes = append(raw, ["a", "a", "b", "b", "c"], published, scores, retired=np.array([[1, 1], [1, 2]]))
    assert codes == [[0, 2], [0, 2], [1, 0], [1, 0], codes[4]] and codes[4][0] != 1, "prefix 1 is full: two retired SIDs and b"


def test_items_of_a_full_prefix_move_to_the_next_best_free_prefix():
    published = [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1], [2, 2], NEW]
    raw = [*published[:6], [0, 1]]
    scores = np.zeros((7, 3))
    scores[6] = [-2.0, -1.0, -3.0]
    assert append(raw, list("abcdefg"), published, scores, prefixes=(0, 2, 1))[6] == [1, 1]
    assert append(raw, list("abcdefg"), published, scores)[6] == [1, 1], "all candidates full: the nearest free prefix"


def test_errors_and_the_policy_none():
    full = [[0, 0], [0, 1], NEW]
    with pytest.raises(MmsidError, match=r"2 of 2 are taken"):
        append([[0, 0]] * 3, list("abc"), full, np.zeros((3, 2)), sizes=(1, 2))
    assert append([[0, 0]] * 3, list("abc"), full, np.zeros((3, 2)), sizes=(1, 2), policy="none")[2] == [0, 0]
    with pytest.raises(MmsidError, match="suffix"):
        append([[0, 0]], ["a"], [NEW], np.zeros((1, 3)), policy="suffix")
    with pytest.raises(MmsidError, match="row 1 is NaN"):
        append([[0, 0]] * 2, ["a", "b"], [[0, 0], NEW], np.full((2, 3), np.nan))


def test_row_order_has_no_effect_and_two_appends_differ_only_for_contested_sids():
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
            "relocate", raw[rows], names, published, sizes, lambda rows, _: np.stack([log_pi[names[row]] for row in rows]), lambda row: []
        )

    order = rng.permutation(count)
    unpublished = np.full((count, 3), -1)
    once = run(np.arange(count), unpublished)
    assert np.array_equal(once[order], run(order, unpublished))
    assert len(np.unique(once, axis=0)) == len(by_hash)
    first = np.flatnonzero(np.arange(count) % 2 == 0)
    published = unpublished.copy()
    published[first] = run(first, unpublished[first])
    twice = run(np.arange(count), published)
    assert np.array_equal(twice[first], published[first]), "published codes do not change"
    assert len(np.unique(twice, axis=0)) == len(by_hash)
    uncontested = np.array([sum(np.array_equal(raw[row], raw[other]) for other in by_hash.values()) == 1 for row in range(count)])
    unchanged = uncontested & (once == raw).all(1) & (twice == raw).all(1)
    assert unchanged.sum() >= 0.8 * uncontested.sum() > 0, "uncontested raw SIDs are kept, except for a few taken by displaced items"


def test_a_growing_table_gives_what_repeated_appends_to_the_whole_table_give():
    rng = np.random.default_rng(1)
    count, sizes = 90, (3, 4, 5)
    hashes = [f"{rng.integers(0, 50):03}" for _ in range(count)]
    raw_of = {content: rng.integers(0, sizes) for content in hashes}
    scores_of = {content: np.log(rng.dirichlet(np.ones(5))) for content in hashes}
    raw, retired = np.stack([raw_of[content] for content in hashes]), np.array([[0, 0, 0], [1, 1, 1]])
    whole, growing = np.full((count, 3), -1), None
    for start in range(0, count, 30):
        rows = np.arange(start, start + 30)
        names = hashes[: start + 30]
        functions = (lambda rows, _, names=names: np.stack([scores_of[names[row]] for row in rows]), lambda row: [])
        whole[: start + 30] = append_codes("relocate", raw[: start + 30], names, whole[: start + 30], sizes, *functions, retired)
        if growing is None:
            growing = GrowingSids("relocate", whole[:30], hashes[:30], sizes, retired)
            continue
        assert np.array_equal(growing.append(raw[rows], [hashes[row] for row in rows], *functions, rows), whole[rows])
    assert not {tuple(codes) for codes in whole.tolist()} & {tuple(codes) for codes in retired.tolist()}
