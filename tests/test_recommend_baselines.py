"""SASRec and late fusion learn, and use train prefixes only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from test_recommend_architectures import ITEMS, circle_split
from test_recommend_train import write_catalogue

from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.recommend.classical import classical_baselines
from mmsid.recommend.late_fusion import fuse_scores, late_fusion
from mmsid.recommend.sasrec import SasrecShape, fit_sasrec
from mmsid.recommend.training import Schedule

BRIEF = Schedule(epochs=3, batch_size=32, lr=0.02)


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
