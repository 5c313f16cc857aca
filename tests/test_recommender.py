"""The public recommender: save, load in another process, add items, restrict, and refuse other Semantic IDs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_recommend_train import ITEMS, write_catalogue

import mmsid
from mmsid import Recommender, SidTable
from mmsid.artifacts import sha256, write_tensors
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.catalog.item import Item
from mmsid.errors import ArtifactError, CatalogError, MmsidError
from mmsid.recommend.hybrid import fit_hybrid
from mmsid.recommend.recommender import UnlistedItems
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.training import Schedule, table_paths
from mmsid.sids import write_sid_folder

WORDS = ("alpha", "beta", "gamma", "delta")
TOKENIZER = sha256("tokenizer")
NEW = {"item_id": "fresh", "title": "a new alpha thing", "description": "thing alpha", "categories": ["shoes"]}


def train(folder, seed: int | None = None):
    """Train on the catalogue of 4 groups. -> recommender, histories by id, embeddings by id (near within a group)."""
    numbers = write_catalogue(folder, order_seed=seed)
    catalog = read_catalog(CatalogConfig(items=folder / "items.parquet", sequences=folder / "sequences.parquet"))
    split = split_histories(catalog, CatalogConfig(items=folder).split)
    ids = catalog.item_ids
    places = np.array([numbers[item_id] for item_id in ids])
    codes = np.random.default_rng(0).permutation(64)[:ITEMS][places]
    table = SidTable.from_codes(ids, np.stack([codes // 8, codes % 8], 1), (8, 8), tokenizer_sha256=TOKENIZER)
    embeddings = vectors_of(places)
    shape = SidTransformerShape(d_model=16, heads=2, hidden=16, layers=1, dropout=0.0)
    schedule = Schedule(epochs=3, batch_size=32, lr=0.02)
    fitted = fit_hybrid(table_paths(table), catalog.items, embeddings, split, shape=shape, schedule=schedule)
    histories = [[ids[row] for row in rows] for rows in split.train]
    return Recommender.from_fitted(fitted, catalog.items, table), histories, numbers


def vectors_of(numbers) -> np.ndarray:
    """Embeddings (n, 8) of items by content number; those of one group of ten are near each other."""
    rng = np.random.default_rng(1)
    groups, own = rng.normal(size=(4, 8)), rng.normal(size=(100, 8))
    return (groups[np.asarray(numbers) // 10 % 4] + 0.3 * own[np.asarray(numbers)]).astype(np.float32)


def grown(recommender: Recommender, new_ids: list[str]) -> SidTable:
    """SIDs of the recommender and of new items, which get free codes."""
    table = recommender._state.table
    taken = {tuple(codes) for codes in table.codes.tolist()}
    free = [(a, b) for a in range(8) for b in range(8) if (a, b) not in taken][: len(new_ids)]
    return SidTable.from_codes(
        table.item_ids + new_ids, np.concatenate([table.codes, np.array(free).reshape(-1, 2)]), (8, 8), tokenizer_sha256=TOKENIZER
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recommender")
    recommender, histories, numbers = train(folder / "data")
    recommender.save_pretrained(folder / "saved", figures={"HR@10": 0.5})
    return folder / "saved", histories, numbers


@pytest.fixture
def recommender(trained) -> Recommender:
    return Recommender.from_pretrained(trained[0])


def test_it_is_public():
    assert {"Recommender", "Recommendations"} <= set(dir(mmsid)) and mmsid.Recommender is Recommender


def test_recommendations_are_unseen_sourced_and_good(trained, recommender):
    _, histories, numbers = trained
    found = recommender.recommend(histories, k=5)
    assert len(found) == len(histories) and set(found.status) == {"personal"} and set(found.unknown_ids) == {0}
    right = 0
    for history, items, scores, sources in zip(histories, found.item_ids, found.scores, found.sources, strict=True):
        assert len(items) == len(set(items)) == 5 and not set(items) & set(history)
        assert scores == sorted(scores, reverse=True) and all(sources)
        right += sum(numbers[item] // 10 == numbers[history[0]] // 10 for item in items)
    assert right > 0.8 * 5 * len(histories)  # every user stays in one of 4 groups
    assert {"semantic_id", "co_engagement", "words", "embedding"} == {name for user in found.sources for names in user for name in names}
    with_seen = recommender.recommend(histories[:9], k=40, exclude_seen=False)
    assert all(set(history) <= set(items) for history, items in zip(histories, with_seen.item_ids, strict=False))


def test_results_do_not_depend_on_the_batch(trained, recommender):
    _, histories, _ = trained
    together = recommender.recommend(histories, k=5)
    for user in (0, 17, 89):
        alone = recommender.recommend([histories[user]], k=5)
        assert alone.item_ids[0] == together.item_ids[user] and np.allclose(alone.scores[0], together.scores[user], atol=1e-4)
        assert alone.sources[0] == together.sources[user]


def test_empty_and_unknown_histories_get_popular_items_mixed_with_new_ones(trained, recommender):
    _, histories, _ = trained
    recommender.add_items([NEW], grown(recommender, ["fresh"]), vectors_of([40]))
    found = recommender.recommend([[], ["nobody", "knows"], ["nobody", *histories[0]]], k=6)
    assert found.status == ["empty_history", "unknown_history", "personal"] and found.unknown_ids == [0, 2, 1]
    assert found.item_ids[0] == found.item_ids[1] and len(set(found.item_ids[0])) == 6
    assert found.sources[0] == [("popular",)] * 4 + [("new",), ("popular",)] and found.item_ids[0][4] == "fresh"
    counts = found.scores[0][:4]
    assert counts == sorted(counts, reverse=True)
    assert found.item_ids[2] == recommender.recommend([histories[0]], k=6).item_ids[0]
    assert recommender.recommend([], k=3).item_ids == []
    few = recommender.recommend([[]], k=3, only=["fresh", recommender.item_ids[0]])
    assert set(few.item_ids[0]) == {"fresh", recommender.item_ids[0]}
    assert recommender.recommend([[], histories[0]], only=[]).item_ids == [[], []]


def test_only_restricts_the_candidates_themselves(trained, recommender):
    _, histories, _ = trained
    allowed = recommender.item_ids[::3]
    found = recommender.recommend(histories[:20], k=10, only=[*allowed, "unknown"])
    for history, items in zip(histories, found.item_ids, strict=False):
        assert len(items) == 10 and set(items) <= set(allowed) - set(history)


def test_added_items_are_recommended_at_once_and_known_ones_keep_their_scores(trained, recommender):
    _, histories, _ = trained
    known = list(recommender.item_ids)
    before = recommender.recommend(histories, k=10)
    new = [NEW | {"item_id": f"n{place}", "title": f"thing {place} {WORDS[place % 4]}"} for place in range(8)]
    ids = [one["item_id"] for one in new]
    assert recommender.add_items(new, grown(recommender, ids), vectors_of([40 + 10 * (place % 4) + place // 4 for place in range(8)])) == 8
    again = recommender.recommend(histories, k=10, only=known)
    assert again.item_ids == before.item_ids and again.sources == before.sources
    assert np.allclose(again.scores, before.scores, atol=1e-4)
    found = recommender.recommend(histories, k=20)
    shown = {item for items in found.item_ids for item in items}
    assert shown & set(ids)
    history = [*histories[0], "n0"]  # a new item may occur in a history
    assert recommender.recommend([history], k=5).status == ["personal"] and "n0" not in recommender.recommend([history], k=40).item_ids[0]


@pytest.mark.slow
def test_a_saved_grown_recommender_gives_the_same_answers_in_another_process(trained, recommender, tmp_path):
    _, histories, _ = trained
    recommender.add_items([NEW], grown(recommender, ["fresh"]), vectors_of([40]))
    recommender.save_pretrained(tmp_path / "grown")
    asked = [*histories[:10], ["fresh"], []]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    code = (
        "import json, sys, torch; torch.set_num_threads(1); from dataclasses import asdict; from mmsid import Recommender\n"
        "found = Recommender.from_pretrained(sys.argv[1]).recommend(json.load(open(sys.argv[2])), k=7)\n"
        "print(json.dumps(asdict(found)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "grown"), str(tmp_path / "asked.json")]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    expected = recommender.recommend(asked, k=7)
    assert found["item_ids"] == expected.item_ids and found["status"] == expected.status
    assert np.allclose(found["scores"][:11], expected.scores[:11], atol=1e-5)
    assert found["sources"] == [[list(names) for names in user] for user in expected.sources]
    card = (tmp_path / "grown" / "README.md").read_text()
    assert "of which 1 were added after training" in card and "HR@10 | 0.5" in (trained[0] / "README.md").read_text()


def test_row_order_and_ids_change_nothing(trained, tmp_path):
    folder, histories, numbers = trained
    other, other_histories, other_numbers = train(tmp_path / "shuffled", seed=4)
    one = Recommender.from_pretrained(folder).recommend(histories, k=10)
    two = other.recommend(other_histories, k=10)
    answers = [
        sorted(
            ([found_numbers[item] for item in history], [found_numbers[item] for item in items], scores)
            for history, items, scores in zip(asked, found.item_ids, found.scores, strict=True)
        )
        for found, asked, found_numbers in ((one, histories, numbers), (two, other_histories, other_numbers))
    ]
    assert [row[:2] for row in answers[0]] == [row[:2] for row in answers[1]]
    assert np.allclose([row[2] for row in answers[0]], [row[2] for row in answers[1]], atol=1e-4)


def test_other_semantic_ids_are_refused_with_both_hashes(trained, recommender):
    folder, histories, _ = trained
    table = grown(recommender, ["fresh"])
    Recommender.from_pretrained(folder, sids=table)  # a grown table of the same tokenizer
    moved = replace(table, codes=table.codes[[1, 0, *range(2, len(table))]])
    with pytest.raises(ArtifactError, match=f"hash [0-9a-f]{{12}} .*{recommender.sids_sha256[:12]}.*append"):
        Recommender.from_pretrained(folder, sids=moved)
    with pytest.raises(ArtifactError, match=f"{sha256('other')[:12]}.*{TOKENIZER[:12]}"):
        Recommender.from_pretrained(folder, sids=replace(table, tokenizer_sha256=sha256("other")))
    kept = table.align([item for item in table.item_ids if item not in histories[0]][:20])
    smaller = Recommender.from_pretrained(folder, sids=kept)
    found = smaller.recommend([histories[0], []], k=40)
    assert found.status[0] == "personal" and all(set(items) <= set(kept.item_ids) for items in found.item_ids)


def test_grow_follows_a_catalogue_and_its_sid_folder(trained, recommender, tmp_path):
    _, histories, numbers = trained
    table = grown(recommender, ["fresh", "second"])
    leaving = recommender.item_ids[0]
    table = table.align([item for item in table.item_ids if item != leaving][::-1])
    write_sid_folder(tmp_path / "sids", table, {})
    vectors = vectors_of([numbers.get(item, 40) for item in table.item_ids])
    write_tensors(tmp_path / "sids" / "embeddings.safetensors", {"embeddings": torch.from_numpy(vectors)})
    known = [Item(item, "any", "", (), (), {}, item, ()) for item in table.item_ids if item in numbers]
    new = [Item(item, "a new alpha thing", "", (), (), {}, item, ()) for item in ("fresh", "second")]
    assert recommender.grow([*known, *new], tmp_path / "sids") == 2
    assert recommender.grow([*known, *new], tmp_path / "sids") == 0
    shown = recommender.recommend([*histories, []], k=41)
    assert leaving not in {item for items in shown.item_ids for item in items} and "fresh" in shown.item_ids[-1]
    recommender.save_pretrained(tmp_path / "again")
    loaded = Recommender.from_pretrained(tmp_path / "again").recommend([[]], k=41)
    assert leaving not in loaded.item_ids[0]


def test_mistakes_name_the_place_and_the_remedy(trained, recommender, tmp_path):
    folder, histories, _ = trained
    table, vector = grown(recommender, ["fresh"]), vectors_of([40])
    first = recommender.item_ids[0]
    for error, message, call in (
        (MmsidError, "k is 0", lambda: recommender.recommend([[]], k=0)),
        (MmsidError, r"wrap the history of one user", lambda: recommender.recommend(histories[0])),
        (MmsidError, "collection of item ids", lambda: recommender.recommend([[]], only="fresh")),
        (CatalogError, "item 0 has no item_id", lambda: recommender.add_items([{"title": "x"}], table, vector)),
        (CatalogError, "item 1: the id 'fresh' occurs twice", lambda: recommender.add_items([NEW, NEW], table, np.tile(vector, (2, 1)))),
        (CatalogError, f"knows '{first}' already", lambda: recommender.add_items([NEW | {"item_id": first}], table, vector)),
        (ArtifactError, "no Semantic ID.*'other'", lambda: recommender.add_items([NEW | {"item_id": "other"}], table, vector)),
        (MmsidError, "one row per item", lambda: recommender.add_items([NEW], table)),
        (MmsidError, r"shape \(1, 3\), expected \(1, 8\)", lambda: recommender.add_items([NEW], table, np.zeros((1, 3)))),
        (MmsidError, "1 items are NaN", lambda: recommender.add_items([NEW], table, vector * np.nan)),
        (ArtifactError, "not a recommender folder", lambda: Recommender.from_pretrained(tmp_path)),
        (ArtifactError, "remove it", lambda: recommender.save_pretrained(folder)),
    ):
        with pytest.raises(error, match=message):
            call()
    assert recommender.recommend([histories[0]]).item_ids[0]  # nothing was added halfway
    assert len(recommender.item_ids) == ITEMS == len(recommender._state.sources.counts)


def test_a_damaged_folder_is_refused(trained, recommender, tmp_path):
    recommender.save_pretrained(tmp_path / "damaged")
    path = tmp_path / "damaged" / "ranker.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"ranker.safetensors has sha256"):
        Recommender.from_pretrained(tmp_path / "damaged")


def test_a_history_may_hold_items_that_are_not_listed(trained, recommender):
    """The content of an unlisted item counts as that of a listed one without interactions, and it is never recommended."""
    _, histories, _ = trained
    table = grown(recommender, ["fresh"])
    unlisted = UnlistedItems([NEW], table.align(["fresh"]), vectors_of([40]))
    mixed = [[*histories[0][:2], "fresh"], ["fresh"], histories[3], ["fresh", "nobody"]]
    before = recommender.recommend(mixed, k=8, unlisted=unlisted)
    assert before.status == ["personal"] * 4 and before.unknown_ids == [0, 0, 0, 1]
    assert not any("fresh" in items for items in before.item_ids)
    plain = recommender.recommend(histories[3:4], k=8)
    assert before.item_ids[2] == plain.item_ids[0] and before.item_ids[1] == before.item_ids[3]
    recommender.add_items([NEW], table, vectors_of([40]))
    after = recommender.recommend(mixed, k=8)
    for user in (0, 1, 3):
        assert before.item_ids[user] == after.item_ids[user] and np.allclose(before.scores[user], after.scores[user], atol=1e-4)
    with pytest.raises(CatalogError, match="knows 'fresh' already"):
        recommender.recommend(mixed, k=8, unlisted=unlisted)
