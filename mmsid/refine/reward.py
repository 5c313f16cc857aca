"""`sid_reward`: a small Bradley-Terry model r(item, codes), fitted on pairs of candidate codes of one item.

P(a preferred to b) = sigmoid(r(item, a) - r(item, b)). The labels are *cross-fitted*: features read the co-engagement of one group of
users, the label says which candidate another group's behaviour bears out. The figures that decide whether the model may be used come
from items and users that neither features nor labels of the fit saw. Its rival is the same model given the distances only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmsid.artifacts import read_json, read_tensors, write_json, write_tensors
from mmsid.catalog.pairs import co_engagement
from mmsid.config import Section
from mmsid.errors import ArtifactError
from mmsid.refine.evidence import Codes, CodeTable, EvidenceConfig, Floats, split_users
from mmsid.refine.policy import Reference


class RewardConfig(Section):
    """Size and fit of the reward model, and what it must show before it is used."""

    hidden: int = 32
    rank: int = 16  # of the learned product between item state and code vector
    candidates: int = 6  # per item: half drawn from the reference policy, half evenly over its tree
    tie: float = 0.01  # pairs whose evidence differs by less teach nothing
    steps: int = 300
    batch: int = 2048
    lr: float = 3e-3
    weight_decay: float = 1e-2
    test_items: float = 0.25
    least_gain: float = 0.01  # pair accuracy above the distance-only scorer, on neighbour evidence of unseen users


class Features(NamedTuple):
    """What the reward reads: `scalars` (R, C, F), `item` (R, H) state, `code` (R, C, D) vector of the candidate."""

    scalars: Tensor
    item: Tensor
    code: Tensor


def feature_names(num_levels: int) -> list[str]:
    """Names of the scalars, in order; those that start with `distance` are all that the rival may read."""
    levels = range(1, num_levels + 1)
    return [
        *[f"distance_log_prob_{level}" for level in levels],
        "distance_error_growth",
        *[f"agreement_{level}" for level in levels],
        *[f"chance_{level}" for level in levels],
        *[f"crowd_{level}" for level in levels],
        "collision",
        *[f"coherence_{level}" for level in range(1, num_levels)],
        "log_degree",
    ]


def read_features(reference: Reference, item_vectors: NDArray, table: CodeTable, rows: NDArray, candidates: Codes) -> Features:
    """Features of candidates (R, C, L) of `rows` (R,), measured against everybody else in `table`. `item_vectors` (N, H), unit rows."""
    excess, chance = table.agreement(rows, candidates)
    others = table.others(rows, candidates)
    coherence = []
    for level in range(candidates.shape[-1] - 1):
        mean, _ = table.mean_under(item_vectors, rows, candidates, level)
        length = np.maximum(np.linalg.norm(mean, axis=-1), 1e-9)
        coherence.append(np.einsum("rh,rch->rc", item_vectors[rows], mean) / length)
    growth = reference.error_growth(rows, candidates)
    degree = np.broadcast_to(np.log1p(table.degree[rows])[:, None], growth.shape)
    columns = [
        *np.moveaxis(reference.level_log_prob(rows, candidates), -1, 0),
        growth,
        *np.moveaxis(excess, -1, 0),
        *np.moveaxis(chance, -1, 0),
        *np.moveaxis(np.log1p(others), -1, 0),
        np.minimum(others[..., -1], 1.0),
        *coherence,
        degree,
    ]
    code = reference.code_vectors(torch.as_tensor(candidates, device=reference.states.device)).float().cpu()
    return Features(
        torch.from_numpy(np.stack(columns, axis=-1).astype(np.float32)), torch.from_numpy(item_vectors[rows].astype(np.float32)), code
    )


class SidReward(nn.Module):
    """r(item, codes): standardised scalars and a low-rank product of item state and code vector through one hidden layer.

    Args:
        names: scalar features, fixing their order.
        item_size, code_size: H and D.
        only_distance: read the columns that start with `distance` and nothing else (the rival).
    """

    def __init__(self, names: Sequence[str], item_size: int, code_size: int, hidden: int, rank: int, only_distance: bool = False) -> None:
        super().__init__()
        self.names, self.only_distance = list(names), only_distance
        self.sizes = {"item_size": item_size, "code_size": code_size, "hidden": hidden, "rank": rank}
        keep = [float(not only_distance or name.startswith("distance")) for name in names]
        self.register_buffer("keep", torch.tensor(keep))
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("deviation", torch.ones(len(names)))
        self.item = nn.Linear(item_size, rank, bias=False)
        self.code = nn.Linear(code_size, rank, bias=False)
        self.mix = nn.Sequential(nn.Linear(len(names) + rank, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def standardise(self, scalars: Tensor) -> None:
        """Take mean and deviation of each scalar from the fitting data (…, F)."""
        flat = scalars.reshape(-1, scalars.shape[-1])
        self.mean.copy_(flat.mean(0))
        self.deviation.copy_(flat.std(0, correction=0).clamp(min=1e-4))

    def forward(self, features: Features) -> Tensor:
        """-> (R, C) rewards; only differences inside one row mean something."""
        scalars = ((features.scalars - self.mean) / self.deviation).clamp(-8, 8) * self.keep
        product = self.item(features.item)[:, None] * self.code(features.code)
        if self.only_distance:
            product = torch.zeros_like(product)
        return self.mix(torch.cat([scalars, product], dim=-1)).squeeze(-1)

    def save(self, folder: Path, report: dict[str, Any]) -> None:
        """Write `reward.safetensors` and `reward.json` (shape, feature names, held-out figures)."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "reward.safetensors", self.state_dict())
        write_json(folder / "reward.json", {"names": self.names, "only_distance": self.only_distance, **self.sizes, "report": report})

    @classmethod
    def load(cls, folder: Path) -> SidReward:
        """Read what `save` wrote. Raises ArtifactError when a file is missing or does not fit the other."""
        described = read_json(folder / "reward.json")
        described.pop("report", None)
        model = cls(**described)
        try:
            model.load_state_dict(read_tensors(folder / "reward.safetensors"))
        except RuntimeError as error:
            raise ArtifactError(f"{folder}: reward.safetensors does not fit reward.json; run the refine stage again") from error
        return model.eval()


def bradley_terry_loss(preferred: Tensor, other: Tensor) -> Tensor:
    """-mean log sigmoid(r_preferred - r_other); any shape -> scalar."""
    return -nn.functional.logsigmoid(preferred - other).mean()


class Pairs(NamedTuple):
    """Comparisons: item `row` number in the features, candidate that won, candidate that lost; each (P,) int64."""

    row: NDArray[np.int64]
    better: NDArray[np.int64]
    worse: NDArray[np.int64]


def make_pairs(evidence: Floats, tie: float) -> Pairs:
    """All pairs of candidates of one item whose evidence (R, C) differs by more than `tie`; the higher one is preferred."""
    left, right = np.triu_indices(evidence.shape[1], k=1)
    gap = evidence[:, left] - evidence[:, right]
    row, pair = np.nonzero(np.abs(gap) > tie)
    first = gap[row, pair] > 0
    return Pairs(row, np.where(first, left[pair], right[pair]), np.where(first, right[pair], left[pair]))


def pair_accuracy(scores: NDArray, pairs: Pairs) -> float:
    """Share of pairs (R, C scores) ordered rightly, a tie counting half; NaN without pairs."""
    if len(pairs.row) == 0:
        return float("nan")
    gap = scores[pairs.row, pairs.better] - scores[pairs.row, pairs.worse]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def calibration_error(scores: NDArray, pairs: Pairs, bins: int = 10) -> float:
    """Expected calibration error of sigmoid(r_a - r_b): confidence of the favoured side against how often it wins; NaN without pairs."""
    if len(pairs.row) == 0:
        return float("nan")
    gap = scores[pairs.row, pairs.better] - scores[pairs.row, pairs.worse]
    confidence = 1.0 / (1.0 + np.exp(-np.abs(gap)))
    right = (gap > 0) + 0.5 * (gap == 0)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    size = np.bincount(which, minlength=bins)
    error = np.abs(np.bincount(which, weights=confidence, minlength=bins) - np.bincount(which, weights=right, minlength=bins))
    return float(error.sum() / max(size.sum(), 1))


def fit(model: SidReward, features: Features, pairs: Pairs, config: RewardConfig, seed: int) -> None:
    """Minimise the Bradley-Terry loss in place: AdamW, cosine rate, `steps` batches drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    model.standardise(features.scalars)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    row, better, worse = (torch.from_numpy(part) for part in pairs)
    for _ in range(config.steps):
        chosen = torch.randint(len(row), (min(config.batch, len(row)),), generator=generator)
        rows = row[chosen]
        sides = torch.stack([better[chosen], worse[chosen]], dim=1)
        scores = model(Features(features.scalars[rows[:, None], sides], features.item[rows], features.code[rows[:, None], sides]))
        loss = bradley_terry_loss(scores[:, 0], scores[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Material:
    """What the fit reads besides users: the reference, unit item vectors (N, H), current codes (N, L), duplicates' numbers (N,)."""

    reference: Reference
    item_vectors: NDArray
    codes: Codes
    content: NDArray

    def table(self, histories: Sequence[NDArray], config: EvidenceConfig) -> CodeTable:
        neighbours = co_engagement(list(histories), len(self.codes), config.window)
        return CodeTable(self.codes, self.reference.head.codebook_size, neighbours, self.content, config.prior)


def draw_candidates(reference: Reference, rows: NDArray, count: int, seed: int) -> Codes:
    """(R,) -> (R, count, L) candidate codes: the first half drawn from the reference policy, the rest evenly over the tree."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = reference.tree.log_prob[torch.as_tensor(rows, device=reference.tree.log_prob.device)].cpu()
    drawn = torch.multinomial(log_prob.exp(), count // 2, replacement=True, generator=generator)
    even = torch.randint(log_prob.shape[1], (len(rows), count - count // 2), generator=generator)
    picks = torch.cat([drawn, even], dim=1).numpy()
    return reference.tree.codes.cpu().numpy()[rows[:, None], picks]


def train_reward(
    material: Material, histories: Sequence[NDArray], evidence: EvidenceConfig, config: RewardConfig, seed: int
) -> tuple[SidReward, dict[str, Any]]:
    """Fit `sid_reward` and its distance-only rival; -> the model and its held-out report.

    Users are split .4/.4/.2: features of one group predict the labels of the other, both ways round; the last group labels the test
    items. `report["usable"]` says whether the model beats its rival by `least_gain` on neighbour evidence, `report["reason"]` why not.
    """
    first, second, last = split_users(histories, (0.4, 0.4, 0.2), seed)
    order = np.random.default_rng(seed).permutation(len(material.codes))
    _, kind = np.unique(material.content, return_inverse=True)  # exact duplicates stay on one side of the split
    kinds = np.random.default_rng(seed + 1).permutation(int(kind.max()) + 1)
    testing = kinds[kind] < config.test_items * len(kinds)
    train_rows, test_rows = order[~testing[order]], order[testing[order]]

    fitted: list[Features] = []
    labelled: list[Pairs] = []
    for turn, (seen, judge) in enumerate(((first, second), (second, first))):
        candidates = draw_candidates(material.reference, train_rows, config.candidates, seed + turn)
        growth = material.reference.error_growth(train_rows, candidates)
        pairs = make_pairs(material.table(judge, evidence).evidence(train_rows, candidates, growth, evidence), config.tie)
        features = read_features(material.reference, material.item_vectors, material.table(seen, evidence), train_rows, candidates)
        labelled.append(pairs._replace(row=pairs.row + turn * len(train_rows)))
        fitted.append(features)
    features = Features(*(torch.cat(parts) for parts in zip(*fitted, strict=True)))
    pairs = Pairs(*(np.concatenate(parts) for parts in zip(*labelled, strict=True)))

    candidates = draw_candidates(material.reference, test_rows, config.candidates, seed + 2)
    judge_table = material.table(last, evidence)
    growth = material.reference.error_growth(test_rows, candidates)
    test_features = read_features(
        material.reference, material.item_vectors, material.table([*first, *second], evidence), test_rows, candidates
    )
    neighbours = judge_table.components(test_rows, candidates, growth, evidence)["neighbours"]
    tests = {
        "evidence": make_pairs(judge_table.evidence(test_rows, candidates, growth, evidence), config.tie),
        "neighbours": make_pairs(neighbours, config.tie),
    }
    report: dict[str, Any] = {"pairs": len(pairs.row), "test_pairs": {name: len(part.row) for name, part in tests.items()}}
    names = feature_names(material.codes.shape[1])
    sizes = (features.item.shape[1], features.code.shape[-1], config.hidden, config.rank)
    if min(len(pairs.row), *(len(part.row) for part in tests.values())) == 0:
        report |= {
            "usable": False,
            "reason": "co-engagement of the fit users tells no candidate codes apart: nothing to learn a reward from",
        }
        return _seeded(names, sizes, False, seed), report
    models = {}
    for name, only_distance in (("reward", False), ("distance_only", True)):
        model = models[name] = _seeded(names, sizes, only_distance, seed)
        fit(model, features, pairs, config, seed)
        with torch.no_grad():
            scores = model.eval()(test_features).double().numpy()
        report[name] = {f"accuracy_{label}": pair_accuracy(scores, part) for label, part in tests.items()}
        report[name]["calibration_error"] = calibration_error(scores, tests["evidence"])
    gain = report["reward"]["accuracy_neighbours"] - report["distance_only"]["accuracy_neighbours"]
    report |= {"gain": gain, "usable": bool(gain >= config.least_gain), "reason": ""}
    if not report["usable"]:
        report["reason"] = (
            f"sid_reward orders {report['reward']['accuracy_neighbours']:.3f} of the held-out pairs rightly, a scorer that knows only the "
            f"distances {report['distance_only']['accuracy_neighbours']:.3f}; needed {config.least_gain:.3f} more"
        )
    return models["reward"], report


def _seeded(names: list[str], sizes: tuple[int, int, int, int], only_distance: bool, seed: int) -> SidReward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SidReward(names, *sizes, only_distance=only_distance)
