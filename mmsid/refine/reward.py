"""Reward model `sid_reward`: a Bradley-Terry model r(item, codes) fitted on pairs of candidate codes of one item.

P(a preferred to b) = sigmoid(r(item, a) - r(item, b)). Labels are cross-fitted: features read the co-engagement of one half of the users,
labels that of the other. r adds two experts that are fitted separately, because the distances of a tokenizer that was fitted on the same
users already contain the labels; the distance expert is also the rival that the model must beat on held-out users.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from mmsid.artifacts import read_json, read_weights, write_json, write_tensors
from mmsid.config import Section
from mmsid.errors import ArtifactError
from mmsid.refine.evidence import Codes, CodeTable, EvidenceConfig, split_users
from mmsid.refine.features import FEATURE_GROUPS, Material, exchanged, feature_names, read_features
from mmsid.refine.policy import BATCH, Reference
from mmsid.refine.preference_pairs import Pairs, calibration_curve, calibration_error, gain_error, make_pairs, pair_accuracy


class RewardConfig(Section):
    """Size and fit of the reward model, and the condition for its use.

    Attributes:
        hidden: width of both experts.
        distance_weight: weight of the distance expert in r; below 1 because the distances of a wrong start are themselves wrong and would
            veto its correction (docs/experiments/reward_model.md).
        candidates: candidate codes per item, half drawn from the reference policy, half uniformly from its tree.
        tie: pairs whose evidence differs by less are left out of the fit.
        test_tie: the same in the held-out report.
        steps: optimiser steps of the fit.
        batch: pairs per step.
        lr: peak learning rate.
        weight_decay: weight decay of AdamW.
        folds: cross-validation folds over items.
        test_candidates: candidate codes per item in the held-out report.
        least_gain: pair accuracy on held-out users by which the model must exceed the distance expert.
    """

    hidden: int = 32
    distance_weight: float = Field(0.3, ge=0)
    candidates: int = 6
    tie: float = 0.02
    steps: int = 300
    batch: int = 2048
    lr: float = 3e-3
    weight_decay: float = 1e-2
    folds: int = Field(3, ge=2)
    test_candidates: int = 12
    test_tie: float = 0.05
    least_gain: float = 0.0


class SidReward(nn.Module):
    """r(item, codes) = behaviour expert + `distance_weight` * distance expert, each one hidden layer over its standardised features.

    Args:
        names: feature names, which define the order and the expert of each feature.
        hidden: width of both experts.
    """

    def __init__(self, names: Sequence[str], hidden: int, distance_weight: float = 1.0) -> None:
        super().__init__()
        self.names, self.hidden, self.distance_weight = list(names), hidden, distance_weight
        self.of_distance = [name.startswith("distance") for name in names]
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("deviation", torch.ones(len(names)))
        self.behaviour = _expert(self.of_distance.count(False), hidden)
        self.distance = _expert(self.of_distance.count(True), hidden)

    def standardise(self, features: Tensor) -> None:
        """Set mean and deviation of each feature from training data (..., F)."""
        flat = features.reshape(-1, features.shape[-1])
        self.mean.copy_(flat.mean(0))
        self.deviation.copy_(flat.std(0, correction=0).clamp(min=1e-4))

    def experts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the behaviour expert and of the distance expert, features (..., F) -> (...) each."""
        scaled = ((features - self.mean) / self.deviation).clamp(-8, 8)
        of_distance = torch.tensor(self.of_distance, device=features.device)
        return self.behaviour(scaled[..., ~of_distance]).squeeze(-1), self.distance(scaled[..., of_distance]).squeeze(-1)

    def forward(self, features: Tensor) -> Tensor:
        """Features (R, C, F) -> rewards (R, C). Only differences within a row are meaningful."""
        behaviour, distance = self.experts(features)
        return behaviour + self.distance_weight * distance

    def save(self, folder: Path, report: dict[str, Any]) -> None:
        """Write `reward.safetensors` and `reward.json` (shape, feature names, held-out figures)."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "reward.safetensors", self.state_dict())
        described = {"names": self.names, "hidden": self.hidden, "distance_weight": self.distance_weight, "report": report}
        write_json(folder / "reward.json", described)

    @classmethod
    def load(cls, folder: Path) -> SidReward:
        """Load a saved model. Raises ArtifactError when a file is missing, contains NaN, or the two files do not match."""
        described = read_json(folder / "reward.json")
        described.pop("report", None)
        model = cls(**described)
        try:
            model.load_state_dict(read_weights(folder / "reward.safetensors"))
        except RuntimeError as error:
            raise ArtifactError(f"{folder}: reward.safetensors does not match reward.json; run the refine stage again") from error
        return model.eval()


def _expert(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 1))


def bradley_terry_loss(preferred: Tensor, other: Tensor) -> Tensor:
    """-mean log sigmoid(r_preferred - r_other); any shape -> scalar."""
    return -nn.functional.logsigmoid(preferred - other).mean()


def fit(model: SidReward, features: Tensor, pairs: Pairs, config: RewardConfig, seed: int) -> None:
    """Minimise the Bradley-Terry loss of each expert in place: AdamW, cosine schedule, `steps` batches drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    model.standardise(features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    row, better, worse = (torch.from_numpy(part) for part in pairs)
    for _ in range(config.steps):
        chosen = torch.randint(len(row), (min(config.batch, len(row)),), generator=generator)
        sides = torch.stack([better[chosen], worse[chosen]], dim=1)
        experts = model.experts(features[row[chosen][:, None], sides])
        loss = sum(bradley_terry_loss(scores[:, 0], scores[:, 1]) for scores in experts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def draw_candidates(reference: Reference, rows: NDArray, count: int, seed: int) -> Codes:
    """Candidate codes (R, count, L) of `rows` (R,): the first half from the reference policy, the rest uniformly from its trees."""
    generator, drawn, propose = torch.Generator().manual_seed(seed), [], reference.proposals(reference.greedy)
    for piece in torch.as_tensor(rows, device=reference.states.device).split(BATCH):
        tree = reference.tree(piece, propose)
        likely = torch.multinomial(tree.log_prob.exp().cpu(), count // 2, replacement=True, generator=generator)
        even = torch.randint(tree.log_prob.shape[1], (len(piece), count - count // 2), generator=generator)
        drawn.append(tree.paths(torch.cat([likely, even], dim=1)))
    return np.concatenate(drawn)


def train_reward(
    material: Material,
    histories: Sequence[NDArray],
    held_out: Sequence[NDArray],
    evidence: EvidenceConfig,
    config: RewardConfig,
    seed: int,
    weights: Sequence[NDArray] | None = None,
    held_out_weights: Sequence[NDArray] | None = None,
) -> tuple[SidReward, dict[str, Any]]:
    """Fit `sid_reward` on all items and evaluate it on held-out users.

    The fit users are split into halves: features of one half predict the labels of the other, in both directions. The report comes from
    `folds` further fits, each evaluated on the items it was not fitted on, with features from all fit users and labels from `held_out`.

    Args:
        weights, held_out_weights: event weights of `histories` and `held_out`; they weight the co-engagement.

    Returns:
        The model, and a report with

        * accuracy: share of the held-out pairs in the right order under the reward, under each expert alone (`distance_only` is the rival,
          fitted on the same labels) and under the plain distance (`distance_unfitted`);
        * usable, reason: whether the gain over the rival exceeds `least_gain`; gain, gain_error: the gain and its standard error over
          items; gain_over_unfitted;
        * carried: accuracy lost per group of features when they are permuted between the candidates of an item;
        * calibration, calibration_error: see `calibration_curve`.
    """
    rows = np.arange(len(material.codes))
    first, second = split_users(range(len(histories)), (0.5, 0.5), seed)

    def table_of(users: Sequence[int]) -> CodeTable:
        chosen = None if weights is None else [weights[user] for user in users]
        return material.table([histories[user] for user in users], evidence, chosen)

    fitted: list[Tensor] = []
    labelled: list[Pairs] = []
    for half, (feature_users, label_users) in enumerate(((first, second), (second, first))):
        candidates = draw_candidates(material.reference, rows, config.candidates, seed + half)
        pairs = make_pairs(table_of(label_users).neighbours(rows, candidates, evidence), config.tie)
        labelled.append(pairs._replace(row=pairs.row + half * len(rows)))
        table = table_of(feature_users)
        fitted.append(read_features(material, table, rows, candidates))
    features = torch.cat(fitted)
    pairs = Pairs(*(np.concatenate(parts) for parts in zip(*labelled, strict=True)))

    candidates = draw_candidates(material.reference, rows, config.test_candidates, seed + 2)
    table = material.table(histories, evidence, weights)
    test_features = read_features(material, table, rows, candidates)
    test = make_pairs(material.table(held_out, evidence, held_out_weights).neighbours(rows, candidates, evidence), config.test_tie)
    report: dict[str, Any] = {"pairs": len(pairs.row), "test_pairs": len(test.row)}
    names = feature_names(material.codes.shape[1])
    if min(len(pairs.row), len(test.row)) == 0:
        report |= {
            "usable": False,
            "reason": "co-engagement of the fit users prefers no candidate codes over others: there is nothing to learn a reward from",
        }
        return _seeded(names, config, seed), report

    _, kind = np.unique(material.content, return_inverse=True)  # exact duplicates are in one fold
    fold = (np.random.default_rng(seed).permutation(int(kind.max()) + 1) % config.folds)[kind]
    permuted = {f"without_{group}": exchanged(test_features, names, group, seed) for group in FEATURE_GROUPS}
    scores = {name: np.zeros(candidates.shape[:2]) for name in ("reward", "distance_only", "behaviour_only", *permuted)}
    for left_out in range(config.folds):
        model = _seeded(names, config, seed)
        fit(model, features, Pairs(*(part[fold[pairs.row % len(rows)] != left_out] for part in pairs)), config, seed)
        tested = torch.from_numpy(fold == left_out)
        with torch.no_grad():
            behaviour, distance = model.experts(test_features[tested])
            found = {"reward": model(test_features[tested]), "distance_only": distance, "behaviour_only": behaviour}
            found |= {name: model(part[tested]) for name, part in permuted.items()}
        for name, value in found.items():
            scores[name][tested.numpy()] = value.double().numpy()
    scores["distance_unfitted"] = -material.reference.error_growth(rows, candidates)
    accuracy = {name: pair_accuracy(value, test) for name, value in scores.items()}
    report["accuracy"] = {name: value for name, value in accuracy.items() if name not in permuted}
    report["carried"] = {group: accuracy["reward"] - accuracy[f"without_{group}"] for group in FEATURE_GROUPS}
    report["calibration"] = calibration_curve(scores["reward"], test)
    report["calibration_error"] = calibration_error(report["calibration"])
    own, rival = accuracy["reward"], accuracy["distance_only"]
    report |= {"gain": own - rival, "gain_error": gain_error(scores["reward"], scores["distance_only"], test, len(rows))}
    report |= {"gain_over_unfitted": own - accuracy["distance_unfitted"], "usable": bool(own - rival > config.least_gain), "reason": ""}
    if not report["usable"]:
        report["reason"] = (
            f"sid_reward orders {own:.3f} of the held-out pairs correctly, a scorer of the distances alone {rival:.3f}; "
            f"the gain must exceed {config.least_gain:.3f} (refine.reward.least_gain)"
        )
    final = _seeded(names, config, seed)
    fit(final, features, pairs, config, seed)
    return final.eval(), report


def _seeded(names: list[str], config: RewardConfig, seed: int) -> SidReward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SidReward(names, config.hidden, config.distance_weight)
