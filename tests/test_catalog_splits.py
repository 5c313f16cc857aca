"""Splits, co-engagement and canonical order: hand calculations, and independence of row order and ids."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsid.catalog import Catalog, CatalogConfig, SplitConfig, UserHistory, adjacent_pairs, co_engagement, read_catalog, split_histories
from mmsid.catalog.item import Item
from mmsid.errors import CatalogError


def catalog_of(histories: list[list[int]], times: list[list[float]] | None = None, num_items: int = 10) -> Catalog:
    items = [Item(f"i{row}", "", "", (), (), {}, f"{row:064d}", ()) for row in range(num_items)]
    users = [
        UserHistory(f"u{user}", np.array(rows, dtype=np.int64), None if times is None else np.array(times[user]))
        for user, rows in enumerate(histories)
    ]
    return Catalog(items, users)


def test_leave_one_out_by_hand():
    split = split_histories(catalog_of([[0, 1, 2, 3, 4], [5, 6, 7], [8, 9], [1]]), SplitConfig())
    assert [rows.tolist() for rows in split.train] == [[0, 1, 2], [5], [8, 9], [1]]
    assert split.valid.tolist() == [3, 6, -1, -1] and split.test.tolist() == [4, 7, -1, -1]
    assert split.history(0, "valid").tolist() == [0, 1, 2] and split.history(0, "test").tolist() == [0, 1, 2, 3]
    assert split.history(2, "test").tolist() == [8, 9]
    assert split.users("valid").tolist() == split.users("test").tolist() == [0, 1]


def test_time_split_by_hand():
    # all times 1..10; the quantiles .5 and .8, rounded up, are 6 and 9
    times = [[1, 2, 6, 8, 9, 10], [3, 4, 5], [7]]
    histories = [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9]]
    config = SplitConfig(method="time", valid_from=0.5, test_from=0.8)
    split = split_histories(catalog_of(histories, times), config)
    assert [rows.tolist() for rows in split.train] == [[0, 1], [6, 7, 8], []]
    assert split.valid.tolist() == [2, -1, -1]  # user 2 has no interaction before its first item
    assert split.test.tolist() == [4, -1, -1]
    assert split.history(0, "valid").tolist() == [0, 1]
    assert split.history(0, "test").tolist() == [0, 1, 2, 3]
    assert not split.held_out[2] and len(split.fit_histories()) + len(split.held_out_histories()) == 2
    with pytest.raises(CatalogError, match="timestamps"):
        split_histories(catalog_of(histories), config)


def test_the_inner_split_is_a_tenth_of_the_users_fixed_by_seed_and_content():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 10, 6).tolist() for _ in range(200)]
    catalog = catalog_of(histories)
    split = split_histories(catalog, SplitConfig())
    assert split.held_out.sum() == 20 == len(split.held_out_histories()) and len(split.fit_histories()) == 180
    assert np.array_equal(split.held_out, split_histories(catalog, SplitConfig()).held_out)
    assert not np.array_equal(split.held_out, split_histories(catalog, SplitConfig(seed=1)).held_out)
    assert split_histories(catalog, SplitConfig(inner_held_out=0)).held_out.sum() == 0
    later = catalog_of([[*rows[:-2], 0, 1] for rows in histories])  # interactions after train do not matter
    assert {tuple(rows) for rows in split.held_out_histories()} == {
        tuple(rows) for rows in split_histories(later, SplitConfig()).held_out_histories()
    }


def test_co_engagement_by_hand():
    histories = [np.array([0, 1, 2, 3, 4]), np.array([1, 0]), np.array([2, 2, 3]), np.array([], dtype=np.int64), np.array([4])]
    expected = np.zeros((6, 6))
    for left, right, weight in [
        (0, 1, 2.0),  # one step apart in the first history, and in the second
        (0, 2, 1 / 2),
        (0, 3, 1 / 3),
        (1, 2, 1.0),
        (1, 3, 1 / 2),
        (1, 4, 1 / 3),
        (2, 3, 1 + 1 + 1 / 2),
        (2, 4, 1 / 2),
        (3, 4, 1.0),
    ]:
        expected[left, right] = expected[right, left] = weight
    found = co_engagement(histories, 6, window=3)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-15)
    assert found.nnz == 18 and (found != found.T).nnz == 0
    assert co_engagement([], 6).nnz == 0
    assert adjacent_pairs(histories).tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [1, 0], [2, 3]]
    assert adjacent_pairs([]).shape == (0, 2)


def write_catalog(folder: Path, seed: int | None) -> CatalogConfig:
    """40 items (6 of them copies of others), 60 users. A seed shuffles all rows and renames every item, user and file."""
    rng = np.random.default_rng(7)
    folder.mkdir()
    items = [
        {"item_id": f"i{n}", "title": f"thing {min(n, 33)}", "categories": [f"c{min(n, 33) % 4}"], "image": f"{n}.png"} for n in range(40)
    ]
    users = [{"user_id": f"u{n}", "items": [f"i{k}" for k in rng.integers(0, 40, rng.integers(2, 9))]} for n in range(60)]
    for n in range(40):
        Image.new("RGB", (4, 4), (min(n, 33) * 7, 0, 0)).save(folder / f"{n}.png")
    if seed is not None:
        shuffle = random.Random(seed)
        names = [f"{shuffle.random():.12f}" for _ in range(200)]
        for n in range(40):
            (folder / f"{n}.png").rename(folder / f"{names[n]}.png")
        renamed = {f"i{n}": names[n] for n in range(40)}
        for item in items:
            item["image"] = renamed[item["item_id"]] + ".png"
            item["item_id"] = renamed[item["item_id"]]
        for n, user in enumerate(users):
            user["user_id"], user["items"] = names[100 + n], [renamed[item_id] for item_id in user["items"]]
        shuffle.shuffle(items), shuffle.shuffle(users)
    for name, rows in [("items", items), ("sequences", users)]:
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return CatalogConfig(items=folder / "items.jsonl", sequences=folder / "sequences.jsonl")


@pytest.mark.parametrize("limits", [{}, {"max_items": 25, "max_users": 30}])
def test_shuffled_rows_and_renamed_ids_change_nothing(tmp_path, limits):
    straight = read_catalog(write_catalog(tmp_path / "straight", None).model_copy(update=limits))
    split = split_histories(straight, SplitConfig())
    if limits:
        assert len(straight.items) == 25 and len(straight.histories) == 30
        assert all(user.rows.max() < 25 for user in straight.histories)
    for seed in range(3):
        mixed = read_catalog(write_catalog(tmp_path / f"mixed{seed}", seed).model_copy(update=limits))
        assert [item.content_sha256 for item in mixed.items] == [item.content_sha256 for item in straight.items]
        assert [user.rows.tolist() for user in mixed.histories] == [user.rows.tolist() for user in straight.histories]
        other = split_histories(mixed, SplitConfig())
        for name in ("valid", "test", "held_out"):
            assert np.array_equal(getattr(other, name), getattr(split, name)), name
        assert (co_engagement(other.fit_histories(), 40) != co_engagement(split.fit_histories(), 40)).nnz == 0
        assert mixed.problems == straight.problems
    assert straight.sha256 == read_catalog(write_catalog(tmp_path / "again", None).model_copy(update=limits)).sha256
