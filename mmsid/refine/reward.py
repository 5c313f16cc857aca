"""`sid_reward`: a small Bradley-Terry model r(item, codes), fitted on pairs of candidate codes of one item.

P(a preferred to b) = sigmoid(r(item, a) - r(item, b)). The labels are *cross-fitted*: features read the co-engagement of one group of
users, the label says which candidate another group's behaviour bears out. The figures that decide whether the model may be used come
from the inner held-out users, whom neither the fit nor the tokenizer saw, and from items left out of the fit. Its rival is its own
distance expert.

r is a product of two experts, fitted apart and added: one reads behaviour and neighbours (agreement, chance, crowding, coherence, where
the items most alike lie), the other the distances. Why apart: the tokenizer was fitted on the co-engagement of the very users that label
the pairs, so its distances know the labels; a model fitted on both at once leans on them. Drawn demo catalogue, share of held-out pairs
ordered rightly, two seeds: behaviour .787 / .791, distances .791 / .801, fitted together .791 / .802, the two experts added .798 / .806.
Added with equal weight, the distances veto what behaviour proposes: a tokenizer trained on wrong targets repairs nothing, a good one
gains nothing (LOG.md). So they count for less.
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
from mmsid.refine.evidence import Codes, EvidenceConfig, split_users
from mmsid.refine.features import FEATURE_GROUPS, Material, exchanged, feature_names, read_features
from mmsid.refine.policy import Reference
from mmsid.refine.preference_pairs import Pairs, calibration_curve, calibration_error, gain_error, make_pairs, pair_accuracy


class RewardConfig(Section):
    """Size and fit of the reward model, and what it must show before it is used."""

    hidden: int = 32
    distance_weight: float = Field(0.3, ge=0)  # of the distance expert in r: where a start is wrong, its distances are what is wrong
    candidates: int = 6  # per item: half drawn from the reference policy, half evenly over its tree
    tie: float = 0.02  # pairs whose evidence differs by less teach nothing
    steps: int = 300
    batch: int = 2048
    lr: float = 3e-3
    weight_decay: float = 1e-2
    folds: int = Field(3, ge=2)
    test_candidates: int = 12
    test_tie: float = 0.05
    least_gain: float = 0.0  # pair accuracy above the distance expert, labels of the held-out users


class SidReward(nn.Module):
    """r(item, codes) = behaviour expert + `distance_weight` * distance expert, each one hidden layer over its standardised features.

    Args:
        names: features, fixing their order and which expert reads them.
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
        """Take mean and deviation of each feature from the fitting data (…, F)."""
        flat = features.reshape(-1, features.shape[-1])
        self.mean.copy_(flat.mean(0))
        self.deviation.copy_(flat.std(0, correction=0).clamp(min=1e-4))

    def experts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(…, F) -> what the behaviour expert and the distance expert say, each (…)."""
        scaled = ((features - self.mean) / self.deviation).clamp(-8, 8)
        of_distance = torch.tensor(self.of_distance, device=features.device)
        return self.behaviour(scaled[..., ~of_distance]).squeeze(-1), self.distance(scaled[..., of_distance]).squeeze(-1)

    def forward(self, features: Tensor) -> Tensor:
        """(R, C, F) -> (R, C) rewards; only differences inside one row mean something."""
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
        """Read what `save` wrote. Raises ArtifactError when a file is missing, holds NaN, or does not fit the other."""
        described = read_json(folder / "reward.json")
        described.pop("report", None)
        model = cls(**described)
        try:
            model.load_state_dict(read_weights(folder / "reward.safetensors"))
        except RuntimeError as error:
            raise ArtifactError(f"{folder}: reward.safetensors does not fit reward.json; run the refine stage again") from error
        return model.eval()


def _expert(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 1))


def bradley_terry_loss(preferred: Tensor, other: Tensor) -> Tensor:
    """-mean log sigmoid(r_preferred - r_other); any shape -> scalar."""
    return -nn.functional.logsigmoid(preferred - other).mean()


def fit(model: SidReward, features: Tensor, pairs: Pairs, config: RewardConfig, seed: int) -> None:
    """Minimise the Bradley-Terry loss of each expert by itself, in place: AdamW, cosine rate, `steps` batches drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    model.standardise(features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    row, better, worse = (torch.from_numpy(part) for part in pairs)
    for _ in range(config.steps):
        chosen = torch.randint(len(row), (min(config.batch, len(row)),), generator=generator)
        sides = torch.stack([better[chosen], worse[chosen]], dim=1)
        said = model.experts(features[row[chosen][:, None], sides])
        loss = sum(bradley_terry_loss(scores[:, 0], scores[:, 1]) for scores in said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def draw_candidates(reference: Reference, rows: NDArray, count: int, seed: int) -> Codes:
    """(R,) -> (R, count, L) candidate codes: the first half drawn from the reference policy, the rest evenly over the tree."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = reference.tree.log_prob[torch.as_tensor(rows, device=reference.tree.log_prob.device)].cpu()
    drawn = torch.multinomial(log_prob.exp(), count // 2, replacement=True, generator=generator)
    even = torch.randint(log_prob.shape[1], (len(rows), count - count // 2), generator=generator)
    picks = torch.cat([drawn, even], dim=1).numpy()
    return reference.tree.codes.cpu().numpy()[rows[:, None], picks]


def train_reward(
    material: Material,
    histories: Sequence[NDArray],
    held_out: Sequence[NDArray],
    evidence: EvidenceConfig,
    config: RewardConfig,
    seed: int,
) -> tuple[SidReward, dict[str, Any]]:
    """Fit `sid_reward` on all items; -> the model and its held-out report.

    The fit users are split in halves: features of one half predict the labels of the other, both ways round. The report comes from
    `folds` further fits, each judged on the items it did not see, with features from all fit users and labels from
    the `held_out` ones. It holds:

    * accuracy: share of the held-out pairs ordered rightly by the reward, by each of its experts alone (`distance_only` is the rival:
      it too was fitted to the labels), and by the distance to the item's codes as it is (`distance_unfitted`);
    * usable, reason: whether the model beats its rival by more than `least_gain`, and why not; gain, gain_error: by how much, and the
      standard error of that over items; gain_over_unfitted;
    * carried: per group of features, the accuracy lost when the candidates of an item exchange them;
    * calibration, calibration_error: see `calibration_curve`.
    """
    rows = np.arange(len(material.codes))
    first, second = split_users(histories, (0.5, 0.5), seed)
    fitted: list[Tensor] = []
    labelled: list[Pairs] = []
    for turn, (seen, judge) in enumerate(((first, second), (second, first))):
        candidates = draw_candidates(material.reference, rows, config.candidates, seed + turn)
        pairs = make_pairs(material.table(judge, evidence).neighbours(rows, candidates, evidence), config.tie)
        labelled.append(pairs._replace(row=pairs.row + turn * len(rows)))
        table = material.table(seen, evidence)
        fitted.append(read_features(material, table, rows, candidates))
    features = torch.cat(fitted)
    pairs = Pairs(*(np.concatenate(parts) for parts in zip(*labelled, strict=True)))

    candidates = draw_candidates(material.reference, rows, config.test_candidates, seed + 2)
    table = material.table(histories, evidence)
    test_features = read_features(material, table, rows, candidates)
    test = make_pairs(material.table(held_out, evidence).neighbours(rows, candidates, evidence), config.test_tie)
    report: dict[str, Any] = {"pairs": len(pairs.row), "test_pairs": len(test.row)}
    names = feature_names(material.codes.shape[1])
    if min(len(pairs.row), len(test.row)) == 0:
        report |= {
            "usable": False,
            "reason": "co-engagement of the fit users tells no candidate codes apart: nothing to learn a reward from",
        }
        return _seeded(names, config, seed), report

    _, kind = np.unique(material.content, return_inverse=True)  # exact duplicates stay in one fold
    fold = (np.random.default_rng(seed).permutation(int(kind.max()) + 1) % config.folds)[kind]
    hidden = {f"without_{group}": exchanged(test_features, names, group, seed) for group in FEATURE_GROUPS}
    scores = {name: np.zeros(candidates.shape[:2]) for name in ("reward", "distance_only", "behaviour_only", *hidden)}
    for left_out in range(config.folds):
        model = _seeded(names, config, seed)
        fit(model, features, Pairs(*(part[fold[pairs.row % len(rows)] != left_out] for part in pairs)), config, seed)
        judged = torch.from_numpy(fold == left_out)
        with torch.no_grad():
            behaviour, distance = model.experts(test_features[judged])
            said = {"reward": model(test_features[judged]), "distance_only": distance, "behaviour_only": behaviour}
            said |= {name: model(part[judged]) for name, part in hidden.items()}
        for name, value in said.items():
            scores[name][judged.numpy()] = value.double().numpy()
    scores["distance_unfitted"] = -material.reference.error_growth(rows, candidates)
    accuracy = {name: pair_accuracy(value, test) for name, value in scores.items()}
    report["accuracy"] = {name: value for name, value in accuracy.items() if name not in hidden}
    report["carried"] = {group: accuracy["reward"] - accuracy[f"without_{group}"] for group in FEATURE_GROUPS}
    report["calibration"] = calibration_curve(scores["reward"], test)
    report["calibration_error"] = calibration_error(report["calibration"])
    ours, rival = accuracy["reward"], accuracy["distance_only"]
    report |= {"gain": ours - rival, "gain_error": gain_error(scores["reward"], scores["distance_only"], test, len(rows))}
    report |= {"gain_over_unfitted": ours - accuracy["distance_unfitted"], "usable": bool(ours - rival > config.least_gain), "reason": ""}
    if not report["usable"]:
        report["reason"] = (
            f"sid_reward orders {ours:.3f} of the held-out pairs rightly, a scorer that knows only the distances {rival:.3f}; "
            f"it must be better by more than {config.least_gain:.3f}"
        )
    final = _seeded(names, config, seed)
    fit(final, features, pairs, config, seed)
    return final.eval(), report


def _seeded(names: list[str], config: RewardConfig, seed: int) -> SidReward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SidReward(names, config.hidden, config.distance_weight)
