"""The hybrid recommender: sources by hand, exact path scores, candidate evaluation, simulated new items, and what it may read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import sparse
from test_recommend_train import write_catalogue

from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.catalog.item import Item
from mmsid.catalog.splits import Split
from mmsid.errors import MmsidError
from mmsid.recommend import embedding_source, hybrid, term_source
from mmsid.recommend.bench.new_items.protocol import drawn_items
from mmsid.recommend.coengagement_source import CoEngagementSource
from mmsid.recommend.embedding_source import EmbeddingSource, fit_centroids, unit_rows
from mmsid.recommend.evaluate import evaluate, evaluate_candidates
from mmsid.recommend.history_batch import HistoryBatch
from mmsid.recommend.hybrid import fit_hybrid, hidden_items
from mmsid.recommend.item_scorer import ItemScorer
from mmsid.recommend.path_source import PathSource
from mmsid.recommend.paths import ItemPaths, PathTrie, item_paths
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape
from mmsid.recommend.sources import to_features
from mmsid.recommend.sparse_rows import heaviest
from mmsid.recommend.term_source import TermSource
from mmsid.recommend.training import Schedule
from mmsid.recommend.words import fit_vectorizers
from mmsid.sids.readings import Readings

SMALL = SidTransformerShape(d_model=16, heads=2, hidden=16, layers=1, dropout=0.0)
BRIEF = Schedule(epochs=3, batch_size=32, lr=0.02)


def item(name: str, title: str = "", categories: tuple[str, ...] = (), **labels: str) -> Item:
    return Item(name, title, "", (), categories, {key: (value,) for key, value in labels.items()}, name, ())


def all_items(users: int, num_items: int) -> np.ndarray:
    return np.tile(np.arange(num_items), (users, 1))


def test_scores_of_all_sources_by_hand():
    items = [item("a", "red shoe", brand="x"), item("b", "red bag", brand="x"), item("c", "shoe bag", brand="y"), item("d", "lamp")]
    batch, rows = HistoryBatch([np.array([2, 0])], 4), all_items(1, 4)
    near = CoEngagementSource.fit([np.array([0, 1, 2]), np.array([0, 1])], 4)
    scores = near.scores(batch, rows)
    two, one = 1 / 2**0.5, 1.0
    # counts: a 2, b 2, c 1. a -> b twice at distance 1, a -> c once at distance 2, b -> c once
    assert np.allclose(scores["next 0.0"], [[0, 2 / 2, 0.5 * two, 0]])
    assert np.allclose(scores["near 0.6"], [[0.6 * 0.5 * two, one + 0.6 * two, 0.5 * two, 0]])
    assert np.allclose(scores["basket 1.0"], [[two, one + two, two, 0]])
    assert near.propose(batch, 2)["near"].tolist() == [[1, -1]]  # c and a are seen, d has no pair
    assert near.propose(HistoryBatch([np.array([2, 0])], 4, exclude_seen=False), 2)["near"].tolist() == [[1, 2]]
    _, words, labels = fit_vectorizers(items)
    labelled = TermSource("labels", labels, (0.0,), (0.0,)).scores(batch, rows)["labels 0.0"]
    assert labelled[0, 1] == pytest.approx(1) and labelled[0, 2] == 0
    spoken = TermSource("words", words, (0.0, 0.6), (0.6,))
    assert spoken.scores(batch, rows)["words 0.0"][0, 3] == 0
    assert np.allclose(spoken.scores(batch, rows)["words 0.6"], batch.weights(0.6) @ words @ words.T.toarray())
    assert spoken.propose(batch, 3)["words 0.6"].tolist() == [[1, -1, -1]]
    embedding = EmbeddingSource(np.eye(4, dtype=np.float32))
    found = embedding.scores(batch, rows)
    assert np.allclose(found["embedding 0.0"], [[1, 0, 0, 0]]) and np.allclose(found["embedding 0.85"], [[1, 0, 0.85, 0]])
    assert to_features(scores | found).shape == (1, 4, 2 * 7 + 2)


def test_the_largest_values_of_a_sparse_row_are_kept():
    matrix = sparse.csr_matrix(np.array([[3.0, 1.0, 2.0, 2.0], [0.0, 5.0, 0.0, 0.0]]))
    assert heaviest(matrix, 2).toarray().tolist() == [[3, 0, 2, 0], [0, 5, 0, 0]]


def random_paths(num_items: int, sizes: tuple[int, ...], seed: int = 0) -> ItemPaths:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, num_items) for size in sizes], 1)
    codes[1] = codes[0]
    return item_paths(codes, None, sizes)


def random_model(paths: ItemPaths) -> SidTransformer:
    torch.manual_seed(3)
    model = SidTransformer(paths, SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


HISTORIES = [np.array([0, 5]), np.array([7, 8, 9, 9]), np.array([3])]


@pytest.mark.parametrize("sizes", [(4, 3, 5), (2, 2), (1, 7, 1, 3), (9,)])
def test_path_scores_of_candidates_equal_those_of_all_items(sizes, monkeypatch):
    monkeypatch.setattr("mmsid.recommend.path_source.CHUNK", 40)  # several chunks per level
    paths = random_paths(30, sizes)
    model = random_model(paths)
    source, batch = PathSource(model, paths), HistoryBatch(HISTORIES, 30)
    drawn = np.random.default_rng(0).integers(0, 30, (3, 12))
    with torch.no_grad():
        exact = ItemScorer(model, PathTrie.build(paths))(model.last_states(torch.tensor([[0, 5, -1, -1], [7, 8, 9, 9], [3, -1, -1, -1]])))
    assert np.allclose(source.scores(batch, drawn)["path"], np.take_along_axis(exact.numpy(), drawn, 1), atol=1e-4)
    proposed = source.propose(batch, 30)["path"]
    for user, history in enumerate(HISTORIES):
        unseen = np.setdiff1d(np.arange(30), history)
        assert set(proposed[user][proposed[user] >= 0]) == set(unseen)  # nothing is pruned
        scores = exact[user, proposed[user][: len(unseen)]]
        assert (scores.diff() <= 1e-5).all()


def test_added_items_do_not_change_the_path_scores_of_others():
    paths = random_paths(40, (4, 3, 5))
    model = random_model(paths)
    known = np.arange(40) < 30
    before = PathSource(model, ItemPaths(paths.tokens[:30], paths.sizes))
    old = before.scores(HistoryBatch(HISTORIES, 30), all_items(3, 30))["path"]
    proposed = before.propose(HistoryBatch(HISTORIES, 30), 5)["path"]
    before.add(paths.tokens[30:35])
    first = before.scores(HistoryBatch(HISTORIES, 35), all_items(3, 35))["path"]
    before.add(paths.tokens[35:])
    whole = HistoryBatch(HISTORIES, 40)
    after = before.scores(whole, all_items(3, 40))["path"]
    assert np.allclose(after[:, :30], old, atol=1e-5) and np.allclose(after[:, :35], first, atol=1e-5)
    assert np.allclose(PathSource(model, paths, known).scores(whole, all_items(3, 40))["path"], after, atol=1e-5)
    assert (after[:, 30:] <= 0).all() and set(before.propose(whole, 40)["path"][0]) > set(range(30, 40))
    only = HistoryBatch(HISTORIES, 40, allowed=known)
    assert np.array_equal(before.propose(only, 5)["path"], proposed)


def test_large_catalogues_search_an_inverted_file_and_champion_lists(monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    vectors = unit_rows(centres[np.arange(2000) % 20] + 0.3 * rng.normal(size=(2000, 16)))
    batch = HistoryBatch([np.array([row]) for row in range(50)], 2000)
    exact = EmbeddingSource(vectors).propose(batch, 20)["embedding"]
    monkeypatch.setattr(embedding_source, "EXACT_UP_TO", 1000)
    source = EmbeddingSource(vectors, fit_centroids(vectors))
    found = source.propose(batch, 20)["embedding"]
    recall = np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(exact, found, strict=True)])
    assert recall > 0.8
    allowed = np.arange(2000) % 3 == 0
    some = source.propose(HistoryBatch(batch.histories, 2000, allowed=allowed), 20)["embedding"]
    assert allowed[some[some >= 0]].all()
    source.add(vectors[:1])
    assert source.propose(HistoryBatch([np.array([0])], 2001), 1)["embedding"].tolist() == [[2000]]  # a copy of the seen item

    terms = sparse.random(300, 40, density=0.2, random_state=0, format="csr", dtype=np.float32)
    exact_terms = TermSource("words", terms, (0.6,), (0.6,))
    monkeypatch.setattr(term_source, "EXACT_UP_TO", 100)
    monkeypatch.setattr(term_source, "HEAVIEST", 6)
    monkeypatch.setattr(term_source, "POSTINGS", 30)
    batch = HistoryBatch([np.array([row]) for row in range(30)], 300)
    champions = TermSource("words", terms, (0.6,), (0.6,))
    assert np.array_equal(
        champions.scores(batch, all_items(30, 300))["words 0.6"], exact_terms.scores(batch, all_items(30, 300))["words 0.6"]
    )
    a, b = (one.propose(batch, 10)["words 0.6"] for one in (exact_terms, champions))
    assert np.mean([len(np.intersect1d(x, y)) / 10 for x, y in zip(a, b, strict=True)]) > 0.5


def test_candidates_are_ranked_like_full_score_rows():
    rng = np.random.default_rng(1)
    histories = [rng.permutation(20)[:3] for _ in range(40)]
    targets = np.array([rng.choice(np.setdiff1d(np.arange(20), history)) for history in histories])
    split = Split(histories, targets, np.full(40, -1), histories, np.zeros(40, dtype=bool))
    table = np.round(rng.normal(size=(20, 20)), 1)
    table[rng.random((20, 20)) < 0.5] = -np.inf  # no candidates

    def dense(batch: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor(np.stack([table[history[-1]] for history in batch]), dtype=torch.float32)

    def listed(batch: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        scores = dense(batch)
        for row, history in enumerate(batch):
            scores[row, history] = -torch.inf
        items = torch.arange(20).repeat(len(batch), 1).masked_fill(torch.isneginf(scores), -1)
        order = torch.argsort(items, dim=1, descending=True)
        return items.gather(1, order), scores.gather(1, order)

    whole, lists = evaluate(dense, split, "valid", 20), evaluate_candidates(listed, split, "valid", 20)
    assert np.array_equal(whole.ranks.above, lists.ranks.above) and np.array_equal(whole.ranks.tied, lists.ranks.tied)
    assert (lists.ranks.tied == 0).any() and lists.coverage == pytest.approx(whole.coverage)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid") / "data"
    write_catalogue(folder)
    catalog = read_catalog(CatalogConfig(items=folder / "items.parquet", sequences=folder / "sequences.parquet"))
    split = split_histories(catalog, CatalogConfig(items=folder).split)
    codes = np.random.default_rng(0).permutation(64)[: len(catalog.items)]
    paths = ItemPaths(np.stack([codes // 8, codes % 8], 1), (8, 8))
    embeddings = np.random.default_rng(1).normal(size=(len(codes), 8)).astype(np.float32)
    return catalog, split, paths, embeddings


def test_the_hybrid_ranks_and_does_not_use_test(data):
    catalog, split, paths, embeddings = data
    fitted = fit_hybrid(paths, catalog.items, embeddings, split, shape=SMALL, schedule=BRIEF)
    assert fitted.evaluate(split, "test").summary()["HR@5"] > 0.5  # every user stays within ten items; chance is 5 / 40
    other = replace(split, test=np.roll(split.test, 1), before_test=split.before_test[::-1])
    again = fit_hybrid(paths, catalog.items, embeddings, other, shape=SMALL, schedule=BRIEF)
    items, scores = fitted.ranked(split.train[:5])
    assert all(torch.equal(one, two) for one, two in zip((items, scores), again.ranked(split.train[:5]), strict=True))
    alone, score = fitted.ranked([split.train[3]])
    assert torch.equal(items[3][items[3] >= 0], alone[0])
    assert torch.allclose(scores[3][items[3] >= 0], score[0], atol=1e-4)
    assert not np.isin(alone[0].numpy(), split.train[3]).any()


def test_held_out_and_hidden_items_are_kept_from_the_sources_of_the_ranker(data, monkeypatch):
    """The ranker is trained on sources without the last train items and without the hidden items; the final sources use all."""
    catalog, split, paths, embeddings = data
    counted, decoded = [], []
    original, original_fit = CoEngagementSource.fit, hybrid.fit

    def spy(histories, num_items, weights=None):
        counted.append([rows.tolist() for rows in histories])
        return original(histories, num_items, weights)

    def spy_fit(paths, split, **settings):
        decoded.append((len(paths.tokens), [len(rows) for rows in split.train]))
        return original_fit(paths, split, **settings)

    monkeypatch.setattr(CoEngagementSource, "fit", spy)
    monkeypatch.setattr(hybrid, "fit", spy_fit)
    fit_hybrid(paths, catalog.items, embeddings, split, shape=SMALL, schedule=BRIEF, hidden_share=0.3)
    hidden = hidden_items(catalog.items, 0.3, 0)
    assert 0 < hidden.sum() < 25
    inner = [rows[:-1][~hidden[rows[:-1]]].tolist() for rows in split.train]
    assert counted == [inner, [rows.tolist() for rows in split.train]]
    assert decoded == [(40 - hidden.sum(), [*map(len, inner)]), (40, [*map(len, split.train)])]


def test_the_decoder_of_the_ranker_reads_codes_that_do_not_know_held_out_interactions(data, monkeypatch):
    catalog, split, paths, embeddings = data
    readings = Readings(shortened=(paths.tokens + 1) % 8, content=(paths.tokens + 2) % 8)
    decoded, original = [], hybrid.fit
    monkeypatch.setattr(hybrid, "fit", lambda paths, split, **settings: decoded.append(paths.tokens) or original(paths, split, **settings))
    fitted = fit_hybrid(paths, catalog.items, embeddings, split, shape=SMALL, schedule=BRIEF, hidden_share=0.3, readings=readings)
    hidden = hidden_items(catalog.items, 0.3, 0)
    assert np.array_equal(decoded[0], readings.shortened[~hidden]) and np.array_equal(decoded[1], paths.tokens)
    assert np.array_equal(fitted.sources.path.paths.tokens, paths.tokens)


def test_hidden_items_depend_on_content_alone():
    items = [item(str(number)) for number in range(500)]
    hidden = hidden_items(items, 0.1, seed=0)
    assert 25 < hidden.sum() < 80
    assert np.array_equal(hidden_items(items[::-1], 0.1, seed=0), hidden[::-1])
    assert not np.array_equal(hidden_items(items, 0.1, seed=1), hidden) and not hidden_items(items, 0.0, seed=0).any()


def test_an_evaluation_that_hides_items_by_the_same_seed_leaves_items_to_hide():
    items = [item(str(number)) for number in range(500)]
    for seed in range(3):
        known = [one for one, new in zip(items, drawn_items(items, 0.1, seed), strict=True) if not new]
        assert 25 < hidden_items(known, 0.1, seed).sum() < 80


def test_the_hybrid_works_without_embeddings_and_without_text(data):
    catalog, split, paths, _ = data
    bare = [replace(one, title="", description="") for one in catalog.items]
    fitted = fit_hybrid(paths, bare, None, split, shape=SMALL, schedule=BRIEF)
    assert fitted.sources.embedding is None and fitted.evaluate(split, "test").summary()["HR@5"] > 0.5


def test_the_hybrid_without_items_to_hold_out_names_the_remedy(data):
    catalog, split, paths, embeddings = data
    fitted = partial(fit_hybrid, paths, catalog.items, embeddings, shape=SMALL)
    with pytest.raises(MmsidError, match="4 items"):
        fitted(split=replace(split, train=[rows[:1] for rows in split.train]))
