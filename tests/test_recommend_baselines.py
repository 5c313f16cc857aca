"""SASRec, late fusion and the hybrid recommender learn, and use train prefixes only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_recommend_architectures import ITEMS, circle_split
from test_recommend_train import write_catalogue

from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.catalog.items import Item
from mmsid.errors import MmsidError
from mmsid.recommend import hybrid
from mmsid.recommend.classical import classical_baselines
from mmsid.recommend.evidence import Evidence, ranker_features
from mmsid.recommend.hybrid import fit_hybrid
from mmsid.recommend.late_fusion import fuse_scores, late_fusion
from mmsid.recommend.sasrec import SasrecShape, fit_sasrec
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.training import Schedule

SMALL = SidTransformerShape(d_model=16, heads=2, hidden=16, layers=1, dropout=0.0)
BRIEF = Schedule(epochs=3, batch_size=32, lr=0.02)


def item(name: str, title: str = "", categories: tuple[str, ...] = (), **labels: str) -> Item:
    return Item(name, title, "", (), categories, {key: (value,) for key, value in labels.items()}, name, ())


def test_sasrec_learns_a_deterministic_next_item_and_is_repeatable():
    split = circle_split()
    shape = SasrecShape(d_model=32, heads=2, layers=1, dropout=0.0, max_history=6)
    fitted = fit_sasrec(ITEMS, split, shape=shape, schedule=Schedule(epochs=20, batch_size=32, lr=0.01, patience=20))
    assert fitted.evaluate(split, "test").summary()["HR@1"] > 0.9  # chance is 1 / 30
    first, second = (fit_sasrec(ITEMS, split, shape=shape, schedule=Schedule(epochs=1), seed=3).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_fused_scores_by_hand():
    logits = torch.log(torch.tensor([[0.64, 0.16, 0.2], [1.0, 0.0, 0.0]]))
    baseline = torch.tensor([[1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    found = fuse_scores(logits, baseline, weight=0.5, power=0.5)
    # sqrt(.16 / .64) = .5; the baseline scores nothing for the second user
    assert torch.allclose(found, torch.tensor([[0.5 + 0.25, 0.25 + 1.0, 0.5 * 0.3125**0.5], [0.5, 0.0, 0.0]]))


def test_late_fusion_is_tuned_on_valid_and_does_not_use_test(tmp_path):
    write_catalogue(tmp_path / "data")
    catalog = read_catalog(CatalogConfig(items=tmp_path / "data/items.parquet", sequences=tmp_path / "data/sequences.parquet"))
    split = split_histories(catalog, CatalogConfig(items=tmp_path).split)
    hybrid = next(one for one in classical_baselines(catalog.items, split) if one.name == "hybrid_knn").parameters
    score = fit_sasrec(len(catalog.items), split, schedule=BRIEF).score
    chosen = late_fusion(score, hybrid, catalog.items, split)
    other = replace(split, test=np.roll(split.test, 1), before_test=split.before_test[::-1])
    assert late_fusion(score, hybrid, catalog.items, other).parameters == chosen.parameters
    assert chosen.score([split.train[0]]).shape == (1, len(catalog.items))


def test_evidence_by_hand():
    items = [item("a", "red shoe", brand="x"), item("b", "red bag", brand="x"), item("c", "shoe bag", brand="y"), item("d", "lamp")]
    embeddings = np.eye(4, dtype=np.float32)
    scores = Evidence(items, embeddings, [np.array([0, 1, 2]), np.array([0, 1])])([np.array([2, 0])])
    two, one = 1 / 2**0.5, 1.0
    # counts: a 2, b 2, c 1. a -> b twice at distance 1, a -> c once at distance 2, b -> c once
    assert np.allclose(scores["next 0.0"], [[0, 2 / 2, 0.5 * two, 0]])
    assert np.allclose(scores["near 0.6"], [[0.6 * 0.5 * two, one + 0.6 * two, 0.5 * two, 0]])
    assert np.allclose(scores["basket 1.0"], [[two, one + two, two, 0]])
    assert np.allclose(scores["embedding 0.0"], [[1, 0, 0, 0]]) and np.allclose(scores["embedding 0.85"], [[1, 0, 0.85, 0]])
    assert np.allclose(scores["popularity"], np.log1p([[2, 2, 1, 0]]))
    assert scores["labels 0.0"][0, 1] == pytest.approx(1) and scores["labels 0.0"][0, 2] == 0 and scores["words 0.0"][0, 3] == 0
    assert ranker_features(scores).shape == (1, 4, 2 * 7 + 9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid") / "data"
    write_catalogue(folder)
    catalog = read_catalog(CatalogConfig(items=folder / "items.parquet", sequences=folder / "sequences.parquet"))
    split = split_histories(catalog, CatalogConfig(items=folder).split)
    codes = np.random.default_rng(0).permutation(64)[: len(catalog.items)]
    paths = hybrid.ItemPaths(np.stack([codes // 8, codes % 8], 1), (8, 8), np.ones((len(codes), 2), dtype=bool))
    embeddings = np.random.default_rng(1).normal(size=(len(codes), 8)).astype(np.float32)
    return catalog, split, paths, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def test_the_hybrid_ranks_and_does_not_use_test(data):
    catalog, split, paths, embeddings = data
    fitted = fit_hybrid(paths, catalog.items, embeddings, split, shape=SMALL, schedule=BRIEF)
    assert fitted.evaluate(split, "test").summary()["HR@5"] > 0.5  # every user stays within ten items; chance is 5 / 40
    other = replace(split, test=np.roll(split.test, 1), before_test=split.before_test[::-1])
    again = fit_hybrid(paths, catalog.items, embeddings, other, shape=SMALL, schedule=BRIEF)
    scores = fitted.score(split.train[:5])
    assert torch.equal(scores, again.score(split.train[:5]))
    assert torch.allclose(scores[3], fitted.score([split.train[3]])[0], atol=1e-4)


def test_the_targets_of_the_ranker_are_held_out_from_its_sources(data, monkeypatch):
    """The ranker is trained on sources fitted without the last train items; the final sources use all train items."""
    catalog, split, paths, embeddings = data
    used = []

    def spy(items, embeddings, histories):
        used.append([rows.tolist() for rows in histories])
        return Evidence(items, embeddings, histories)

    monkeypatch.setattr(hybrid, "Evidence", spy)
    fit_hybrid(paths, catalog.items, embeddings, split, shape=SMALL, schedule=BRIEF)
    assert used == [[rows[:-1].tolist() for rows in split.train], [rows.tolist() for rows in split.train]]


def test_the_hybrid_without_items_to_hold_out_names_the_remedy(data):
    catalog, split, paths, embeddings = data
    with pytest.raises(MmsidError, match="4 items"):
        fit_hybrid(paths, catalog.items, embeddings, replace(split, train=[rows[:1] for rows in split.train]), shape=SMALL)
