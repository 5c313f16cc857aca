"""Relocation and suffixes, and their independence of row order and ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsid.errors import MmsidError
from mmsid.quantize import CodebookScores, balanced_residual_kmeans
from mmsid.sids import add_suffix, relocate, resolve
from mmsid.sids.grouping import FreeCodes, Groups, distinct_items, lexicographic_order, prefix_keys, prefixes_of


def table_scores(log_pi):
    """Scores that ignore the prefix: fixed (N, K) log pi."""
    return lambda rows, prefixes: np.asarray(log_pi, dtype=float)[rows]


def test_relocation_by_hand():
    # Items 0 and 1 collide on (0, 0). Item 0 loses 1 by moving to code 1, item 1 loses 3: item 0 moves.
    # Item 2 shares the prefix and has code 2: the optimal assignment keeps it. Item 3 is alone under prefix 1.
    log_pi = [[-1, -2, -9], [-1, -4, -9], [-9, -9, -1], [-5, -1, -9]]
    raw = np.array([[0, 0], [0, 0], [0, 2], [1, 0]])
    codes = relocate(raw, table_scores(log_pi), ["a", "b", "c", "d"], 3)
    assert codes.tolist() == [[0, 1], [0, 0], [0, 2], [1, 0]]  # item 3 prefers code 1, but its group has no collision
    assert raw.tolist() == [[0, 0], [0, 0], [0, 2], [1, 0]]


def test_optimal_beats_greedy_by_hand(monkeypatch):
    # Greedy by hash gives item 0 its best code (0), and item 1 then costs 10; the optimal assignment costs 2 + 1.
    log_pi = [[-1, -2], [-1, -10]]
    raw = np.zeros((2, 1), dtype=int)
    assert relocate(raw, table_scores(log_pi), ["a", "b"], 2).ravel().tolist() == [1, 0]
    monkeypatch.setattr("mmsid.sids.relocation._HUNGARIAN_ITEMS", 1)
    assert relocate(raw, table_scores(log_pi), ["a", "b"], 2).ravel().tolist() == [0, 1]


def test_exact_duplicates_share_codes():
    log_pi = np.log(np.full((5, 3), 1 / 3))
    raw = np.zeros((5, 2), dtype=int)
    hashes = ["x", "y", "x", "z", "y"]
    codes = relocate(raw, table_scores(log_pi), hashes, (2, 3))
    assert codes[0].tolist() == codes[2].tolist() and codes[1].tolist() == codes[4].tolist()
    assert len(np.unique(codes, axis=0)) == 3


def test_overfull_group_spills_the_worst_fitting_item():
    # Prefix 0 has two codes and three items; item 2 fits worst and moves to its next free prefix.
    log_pi = np.log([[0.9, 0.1], [0.2, 0.8], [1e-4, 1e-4]])
    raw = np.array([[0, 0], [0, 0], [0, 1]])
    requested = []

    def candidates(row):
        requested.append(row)
        return [((0,), -0.1), ((2,), -1.0), ((1,), -2.0)]

    resolution = resolve("relocate", raw, ["a", "b", "c"], (3, 2), table_scores(log_pi), candidates)
    assert resolution.codes[:2].tolist() == [[0, 0], [0, 1]]
    assert resolution.codes[2, 0] == 2 and requested == [2]
    assert (resolution.moved, resolution.spilled) == (2, 1)


def test_arrivals_take_free_codes_of_a_group_without_collision():
    # Group 1 has one item at code 0 and no collision: the item keeps its code although the arrival prefers code 0.
    log_pi = np.log([[0.9, 0.1], [0.2, 0.8], [0.9, 1e-6], [0.5, 0.5]])
    raw = np.array([[0, 0], [0, 1], [0, 0], [1, 0]])
    codes = relocate(raw, table_scores(log_pi), ["a", "b", "c", "d"], (2, 2), lambda row: [((0,), -1), ((1,), -2)])
    assert codes[3].tolist() == [1, 0]
    assert len(np.unique(codes, axis=0)) == 4


def test_codes_are_unique_when_all_candidates_are_full():
    num_items = 12
    codes = relocate(
        np.zeros((num_items, 3), dtype=int),
        table_scores(np.zeros((num_items, 2))),
        [f"{row:02}" for row in range(num_items)],
        (2, 3, 2),
        lambda row: [((0, 1), -1.0)],
    )
    assert len(np.unique(codes, axis=0)) == num_items  # every SID of the space is taken


def test_errors():
    scores = table_scores(np.zeros((3, 2)))
    zeros = np.zeros((3, 2), dtype=int)
    with pytest.raises(MmsidError, match="3 distinct items cannot have unique SIDs out of 2"):
        relocate(zeros, scores, ["a", "b", "c"], (1, 2))
    with pytest.raises(MmsidError, match="prefix candidates"):
        relocate(zeros, scores, ["a", "b", "c"], (2, 2))
    with pytest.raises(MmsidError, match="row 0 is NaN"):
        relocate(zeros[:2], table_scores(np.full((2, 2), np.nan)), ["a", "b"], (2, 2))
    with pytest.raises(MmsidError, match="unknown"):
        resolve("magic", zeros, ["a", "b", "c"], (2, 2))
    with pytest.raises(MmsidError, match="needs log pi"):
        resolve("relocate", zeros, ["a", "b", "c"], (2, 2))


def test_minus_infinity_scores_are_allowed():
    log_pi = [[0.0, -np.inf], [0.0, -np.inf]]
    assert sorted(relocate(np.zeros((2, 1), dtype=int), table_scores(log_pi), ["a", "b"], 2).ravel()) == [0, 1]


def test_suffix_by_hand():
    raw = np.array([[1, 1], [1, 1], [0, 1], [1, 1], [2, 2], [2, 2]])
    #      bucket (1,1): distinct c, a (twice) -> a 0, c 1.  (0,1): alone.  (2,2): exact duplicates, no collision
    assert add_suffix(raw, ["c", "a", "b", "a", "d", "d"]).tolist() == [1, 0, -1, 0, -1, -1]
    resolution = resolve("suffix", raw, ["c", "a", "b", "a", "d", "d"], (3, 3))
    assert resolution.codes.tolist() == raw.tolist() and resolution.suffix.max() == 1
    assert resolve("none", raw, list("abcdef"), (3, 3)).suffix is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(4, 4, 4), (2, 3, 4), (64,)]), st.integers(1, 60))
def test_codes_are_unique_minimal_and_independent_of_row_order(seed, sizes, num_items):
    rng = np.random.default_rng(seed)
    num_items = min(num_items, int(np.prod(sizes)))
    contents = rng.integers(0, num_items, size=num_items)
    hashes = [f"{content * 7919 % 10007:05}" for content in contents.tolist()]
    by_content = {content: rng.integers(0, sizes) for content in sorted(set(contents.tolist()))}
    raw = np.array([by_content[content] for content in contents.tolist()])
    log_pi = {content: np.log(rng.dirichlet(np.ones(sizes[-1]))) for content in by_content}
    order = rng.permutation(num_items)
    prefixes = {content: rng.integers(0, sizes[:-1], size=(5, len(sizes) - 1)) for content in by_content}

    def run(rows):
        def scores(positions, prefix):
            return np.stack([log_pi[contents[rows[row]]] for row in positions])

        return relocate(
            raw[rows], scores, [hashes[row] for row in rows], sizes, lambda row: [(p, -1.0) for p in prefixes[contents[rows[row]]]]
        )

    codes = run(np.arange(num_items))
    assert np.array_equal(codes[order], run(order))
    assert len(np.unique(codes, axis=0)) == len(set(hashes))
    assert (codes >= 0).all() and (codes < np.array(sizes)).all()
    for prefix in np.unique(raw[:, :-1], axis=0):  # groups without a collision keep their codes
        group = np.flatnonzero((raw[:, :-1] == prefix).all(axis=1))
        if len(np.unique(raw[group], axis=0)) == len({hashes[row] for row in group}):
            assert np.array_equal(codes[group], raw[group])


def test_candidates_of_many_items_at_once_give_the_codes_of_one_at_a_time():
    """Crowded codes: prefixes overflow, narrow beams fail, and some items find a place only beyond their wide beam."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(8, 5))[rng.integers(8, size=600)] + 0.1 * rng.normal(size=(600, 5))).astype(np.float32)
    codebooks = balanced_residual_kmeans(x[:100], 3, 9, rounds=3).codebooks
    raw, scores, contents = codebooks.encode(x).numpy(), CodebookScores(codebooks, x), [f"{number:04}" for number in rng.permutation(600)]
    one_by_one = relocate(raw, scores.last_scores, contents, 9, scores.prefix_candidates)
    at_once = relocate(raw, scores.last_scores, np.array([int(one) for one in contents]), 9, None, scores.prefix_beams)
    assert np.array_equal(one_by_one, at_once) and len(np.unique(at_once, axis=0)) == 600
    assert (at_once[:, :-1] != raw[:, :-1]).any(axis=1).sum() > 50
    narrow = scores.prefix_beams(np.arange(40), 16)
    for row in range(40):
        prefixes = [prefix for prefix, _ in zip(scores.prefix_candidates(row), range(16), strict=False)]
        assert [tuple(prefix) for prefix in narrow[row].tolist()] == [prefix for prefix, _ in prefixes]


def test_free_codes_by_hand():
    # prefixes of two levels with 2 and 3 codes; (0, 1) has one free code left, (1, 2) none; two last codes
    free = FreeCodes(np.array([1, 5]), np.array([1, 0]), (2, 3), 2)
    assert free.counts(np.array([0, 1, 5])).tolist() == [2, 1, 0]
    assert free.take(1) and not free.take(1) and not free.take(5)
    assert free.take_nearest((0, 1)) == 0  # (0, 0) is the first free prefix that starts with 0
    assert free.take(0) and not free.take(0) and free.take(2) and free.take(2)
    assert free.take_nearest((0, 1)) == 3  # every (0, .) is full, so the first free one that starts with 1
    assert [free.take_nearest((1, 2)) for _ in range(3)] == [3, 4, 4]
    assert free.take_nearest((1, 2)) is None and free.counts(np.arange(6)).tolist() == [0] * 6


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=30), st.booleans())
@settings(deadline=None)
def test_groups_and_keys_agree_with_a_dictionary(rows, huge):
    codes = np.array(rows)
    sizes = (2**40, 2**40, 3) if huge else (3, 4, 2)  # keys beyond int64 are Python integers
    keys = prefix_keys(codes, sizes)
    assert np.array_equal(prefixes_of(keys, sizes), codes)
    assert codes[lexicographic_order(codes, sizes)].tolist() == sorted(map(list, rows))
    groups = Groups.of(keys)
    expected = {row: [at for at, other in enumerate(rows) if other == row] for row in sorted(set(rows))}
    assert [groups[at].tolist() for at in range(len(groups))] == list(expected.values())
    last = np.arange(len(rows)) % 2
    repeated = [len({int(last[at]) for at in members}) < len(members) for members in expected.values()]
    assert groups.repeats(last).tolist() == repeated and groups.any(last == 1).tolist() == [bool(last[m].any()) for m in expected.values()]


def test_duplicates_whose_raw_codes_differ_take_the_smallest_ones():
    rows, inverse, codes = distinct_items(np.array([[2, 1], [0, 5], [2, 0], [0, 5]]), np.array([7, 3, 7, 9]))
    assert rows.tolist() == [1, 2, 3] and inverse.tolist() == [1, 0, 1, 2] and codes.tolist() == [[0, 5], [2, 0], [0, 5]]
