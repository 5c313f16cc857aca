"""Churn report, and the renaming that keeps the old vocabulary."""

import numpy as np
import pytest

from mmsid.errors import ArtifactError
from mmsid.sids import SidTable
from mmsid.sids.churn import best_renaming, churn_report, churn_table, rename


def table(codes: dict[str, list[int]], sizes=(3, 2), **columns) -> SidTable:
    return SidTable.from_codes(list(codes), np.array(list(codes.values())), sizes, **columns)


def test_best_renaming_inverts_a_permutation():
    rng = np.random.default_rng(0)
    old = rng.integers(0, (5, 7), (200, 2))
    names = [rng.permutation(5), rng.permutation(7)]
    new = rename(old, [np.argsort(one) for one in names])
    assert all(np.array_equal(a, b) for a, b in zip(best_renaming(old, new, (5, 7)), names))
    assert np.array_equal(rename(new, best_renaming(old, new, (5, 7))), old)


def test_renaming_by_hand_maximises_equal_codes_and_keeps_other_numbers():
    # New code 0 has two items of old code 1 and one of old code 0; new code 1 has one item of old code 1. Swapping and not swapping
    # both keep two items, so the numbers stay. One more item in favour of the swap decides.
    old, new = np.array([[1], [1], [0], [1]]), np.array([[0], [0], [0], [1]])
    assert best_renaming(old, new, (4,))[0].tolist() == [0, 1, 2, 3]
    old, new = np.vstack([old, [[0]]]), np.vstack([new, [[1]]])
    assert best_renaming(old, new, (4,))[0].tolist() == [1, 0, 2, 3]
    assert best_renaming(old[:0], new[:0], (4,))[0].tolist() == [0, 1, 2, 3]


def test_report_by_hand():
    old = table({"a": [0, 0], "b": [0, 1], "c": [1, 0], "d": [2, 0], "gone": [2, 1]}, tokenizer_sha256="x")
    new = table({"d": [2, 1], "c": [0, 0], "b": [1, 1], "a": [1, 0], "new": [0, 1]}, tokenizer_sha256="y")
    report = churn_report(old, new)
    assert report["items"] == {"old": 5, "new": 5, "shared": 4, "gone": 1, "added": 1}
    assert report["changed"] == {"levels": [0.75, 0.25], "any": 1.0} and report["changed_prefix"] == [0.75, 1.0]
    assert report["changed_if_renamed"] == {"levels": [0.0, 0.25], "any": 0.25}, "codes 0 and 1 of level 1 are swapped"
    assert report["kept_together"] == [1.0, None], "a and b share a prefix in both tables; no two shared items had the same SID"
    assert not report["same_tokenizer"]
    assert "| 1 | 75.0% | 0.0% | 75.0% | 75.0% | 100.0% |" in churn_table(report)
    assert churn_report(old, old)["changed"]["any"] == 0.0


def test_errors():
    with pytest.raises(ArtifactError, match="none of the 1 old items"):
        churn_report(table({"a": [0, 0]}), table({"b": [0, 0]}))
    with pytest.raises(ArtifactError, match=r"codebooks \(3, 2\), the new one \(3, 3\)"):
        churn_report(table({"a": [0, 0]}), table({"a": [0, 0]}, sizes=(3, 3)))
