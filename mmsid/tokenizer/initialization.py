"""Closed-form initialization of the item tokenizer: target codes, code vectors, head and embedding projections.

The targets are Sinkhorn-balanced residual k-means codes of the *distilled space*, the part of [content ; co-engagement] that content
predicts. Each code vector stores the price (dual variable of the Sinkhorn plan) of its code in an extra coordinate per level, where
states are 0 and code c is sqrt(price): -|r - e|^2 then contains -price, so that greedy codes of single items are balanced, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from mmsid.catalog import Catalog, Item, Split, co_engagement
from mmsid.config import Section
from mmsid.progress import track
from mmsid.quantize import balanced_residual_kmeans, fuse, ppmi_svd
from mmsid.quantize.sinkhorn import column_log_weights
from mmsid.tokenizer.heads import CodeHead, ParallelHead, ResidualHead
from mmsid.tokenizer.inputs import ItemInput, MinedInterests, attribute_text
from mmsid.tokenizer.losses import code_cross_entropy
from mmsid.tokenizer.model import ItemTokenizer

MIN_CROSS_ENTROPY = 0.25  # nats; cross-entropy of the target codes after initialization, a probability of about 0.78 each
RIDGE_ROWS = 20_000  # states kept for the closed-form solutions: more rows cost RAM and hardly change them
SINKHORN_EPSILON = 0.03  # entropic regularisation, relative to the mean squared residual
SINKHORN_PASSES = 20


class StartSettings(Section):
    """Initialization and behaviour vectors.

    Attributes:
        mode: "balanced" is the closed-form initialization; "random" leaves the heads at random, as UniSID does.
        behaviour_dim: dimension of the factorised co-engagement; 0 leaves behaviour out.
        behaviour_weight: weight of behaviour beside content in the fused space.
        window: two items of a history co-engage if they are at most this many steps apart.
    """

    mode: Literal["balanced", "random"] = "balanced"
    behaviour_dim: int = Field(64, ge=0)
    behaviour_weight: float = Field(1.0, ge=0)
    window: int = Field(3, ge=1)


@dataclass
class Behaviour:
    """Co-engagement in the fit histories.

    Attributes:
        pairs: (N, N) weights; None without sequences.
        vectors: (N, M) factorised weights; (N, 0) without sequences.
        interactions: (N,) occurrences of each item.
    """

    pairs: sparse.csr_matrix | None
    vectors: np.ndarray
    interactions: np.ndarray


@dataclass
class ContentStates:
    """States of the untrained backbone.

    Attributes:
        pooled: (N, H) mean content states of all items.
        rows: (n,) row numbers of the sample that the closed-form solutions are fitted on.
        states: (n, L + 1, H) SID and EMB states of the sample.
    """

    pooled: np.ndarray
    rows: np.ndarray
    states: Tensor


def read_behaviour(catalog: Catalog, split: Split | None, settings: StartSettings, seed: int) -> Behaviour:
    """Co-engagement within `window` steps in the histories of the fit users (90 % of them, train part), factorised by PPMI and SVD."""
    histories = split.fit_histories() if split is not None else []
    if not histories or settings.behaviour_dim == 0 or settings.behaviour_weight == 0:
        return Behaviour(None, np.zeros((len(catalog.items), 0), np.float32), np.zeros(len(catalog.items), np.int64))
    pairs = co_engagement(histories, len(catalog.items), settings.window)
    interactions = np.bincount(np.concatenate(histories), minlength=len(catalog.items))
    return Behaviour(pairs, ppmi_svd(pairs, settings.behaviour_dim, seed=seed), interactions)


@torch.no_grad()
def read_states(tokenizer: ItemTokenizer, inputs: Sequence[ItemInput], batch_size: int, seed: int) -> ContentStates:
    """Run the backbone once over all items, in batches of similar text length."""
    tokenizer.eval()
    kept = np.sort(np.random.default_rng(seed).permutation(len(inputs))[:RIDGE_ROWS])
    index_of = {int(row): index for index, row in enumerate(kept)}
    pooled = np.zeros((len(inputs), tokenizer.backbone.hidden_size), np.float32)
    states = torch.zeros(len(kept), tokenizer.num_levels + 1, tokenizer.backbone.hidden_size)
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row].text))
    for start in track(range(0, len(order), batch_size), what="initial states", unit="batches"):
        rows = order[start : start + batch_size]
        batch = tokenizer.backbone.collate([inputs[row] for row in rows])
        output = tokenizer.backbone.read({key: value.to(tokenizer.device) for key, value in batch.items()})
        pooled[rows] = output.pooled.cpu().numpy()
        for i, row in enumerate(rows):
            if row in index_of:
                states[index_of[row]] = output.states[i].cpu()
    return ContentStates(pooled, kept, states)


def fused_space(pooled: np.ndarray, behaviour: Behaviour, weight: float, *, centre: bool) -> np.ndarray:
    """Fused vectors [content / |content| ; weight x behaviour]: (N, H + M).

    `centre` subtracts the mean content first, because the states of vision-language models share one dominant direction.
    """
    content = pooled - pooled.mean(0, keepdims=True) if centre else pooled
    content = content / np.maximum(np.linalg.norm(content, axis=1, keepdims=True), 1e-12)
    return fuse(content, behaviour.vectors, weight)


def ridge(x: Tensor, y: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ridge regression y ~ x W^T + b: x (n, H), y (n, D) -> W (D, H), b (D,).

    The penalty is a multiple of the mean variance of x, from 1e-4 to 100. It is chosen on a held-out fifth of the rows; the solution
    is then fitted on all rows.
    """
    x, y = x.double(), y.double()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    cut = max(1, len(x) // 5)
    held_out, fit = order[:cut], order[cut:] if len(x) > 5 else order
    solve = _ridge_path(x[fit], y[fit])
    mean_x, mean_y = x[fit].mean(0), y[fit].mean(0)
    penalties = [10.0**power for power in (-4, -3, -2, -1, 0, 1, 2)]
    errors = [((x[held_out] - mean_x) @ solve(penalty) + mean_y - y[held_out]).square().sum().item() for penalty in penalties]
    weight = _ridge_path(x, y)(penalties[int(np.argmin(errors))])
    return weight.T.float().contiguous(), (y.mean(0) - x.mean(0) @ weight).float()


def _ridge_path(x: Tensor, y: Tensor) -> Callable[[float], Tensor]:
    """Penalty -> ridge solution (H, D), from one eigendecomposition."""
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    moment = vectors.T @ (centred.T @ (y - y.mean(0)))
    scale = values.clamp_min(0).mean().clamp_min(1e-12)
    return lambda penalty: vectors @ (moment / (values.clamp_min(0) + penalty * scale)[:, None])


def balanced_start(tokenizer: ItemTokenizer, content: ContentStates, fused: np.ndarray, seed: int) -> Tensor:
    """Cluster the distilled space, initialize the heads from it in place, and return the target codes (N, L).

    The distilled space is the ridge prediction of the fused space from pooled content. Centroids of the fused space itself cannot be
    used: content explains a fifth of the behaviour variance, and content states scored against such centroids collapse onto few codes
    (docs/experiments/tokenizer_start_and_losses.md).

    Residual head: code vectors = centroids with prices, W and b_l = ridge regression of the SID states on the distilled space, t_l =
    the temperature of maximum likelihood of the target codes. Parallel head: ridge regression on one-hot target codes, with one scale
    per level chosen likewise. Embedding head: ridge regression of the EMB states on the fused space.
    """
    settings = tokenizer.settings
    pooled, rows = torch.from_numpy(content.pooled), torch.from_numpy(content.rows)
    weight, bias = ridge(pooled[rows], torch.from_numpy(fused)[rows], seed)
    distilled = pooled @ weight.T + bias
    vectors, codes = priced_codebooks(distilled, settings.num_levels, settings.codebook_size, seed)
    with torch.no_grad():
        weight, bias = ridge(content.states[:, -1], torch.from_numpy(fused)[rows], seed)
        tokenizer.emb_head.weight.copy_(weight)
        tokenizer.emb_head.bias.copy_(bias)
        target = append_price_coordinates(distilled[rows], settings.num_levels)
        start_head(tokenizer.head, vectors, content.states[:, :-1], target, codes[rows], seed)
    return codes


@torch.no_grad()
def refit_head(head: ResidualHead, s: Tensor, seed: int) -> Tensor:
    """Cluster trained states again: s (n, L, code_dim) -> balanced codes (n, L). Code vectors and temperatures are set in place.

    The projection is set to 0 in the price coordinates.
    """
    levels = head.num_levels
    head.projection.weight[-levels:] = 0
    head.bias[:, -levels:] = 0
    content = s[..., :-levels].cpu()
    vectors, codes = priced_codebooks(content, levels, head.codebook_size, seed)
    head.vectors.copy_(vectors)
    s = append_price_coordinates(content, levels).to(head.vectors.device)
    logits = head.teacher_logits(s, codes.to(s.device)) * head.log_temperature.exp()[None, :, None]
    for level in range(levels):
        head.log_temperature[level] = -_best_log_scale(logits[:, level].cpu(), codes[:, level])
    return codes


def append_price_coordinates(x: Tensor, num_levels: int) -> Tensor:
    """(..., D) -> (..., D + L): zeros in the coordinates where code vectors store their prices."""
    return torch.cat([x, x.new_zeros(*x.shape[:-1], num_levels)], -1)


def priced_codebooks(x: Tensor, num_levels: int, codebook_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Balanced residual k-means with balanced greedy codes: code vectors with prices (L, K, D + L) and codes (N, L).

    At each level, the prices are the column weights of the Sinkhorn plan of the squared distances, and the codes are its argmax.

    Args:
        x: (N, D), or (N, L, D) with a vector per level; the centroids are then fitted on the mean over levels.
    """
    per_level = x[:, None].expand(-1, num_levels, -1) if x.dim() == 2 else x
    centroids = balanced_residual_kmeans(per_level.mean(1), num_levels, codebook_size, seed).codebooks.vectors
    vectors = append_price_coordinates(centroids, num_levels)
    codes = torch.zeros(len(x), num_levels, dtype=torch.int64)
    chosen = torch.zeros(len(x), x.shape[-1])
    for level in range(num_levels):
        residual, level_centroids = per_level[:, level] - chosen, centroids[level]
        scale = SINKHORN_EPSILON * residual.square().sum(1).mean().clamp_min(1e-12)
        blocks = [slice(start, start + 8192) for start in range(0, len(x), 8192)]

        def log_scores(rows: slice, residual: Tensor = residual, vectors: Tensor = level_centroids, scale: Tensor = scale) -> Tensor:
            scores = (2 * residual[rows] @ vectors.T - vectors.square().sum(1)) / scale
            return scores - scores.amax(1, keepdim=True)

        weights = column_log_weights(
            lambda log_scores=log_scores, blocks=blocks: (log_scores(rows).exp() for rows in blocks), len(x), codebook_size, SINKHORN_PASSES
        ).float()
        codes[:, level] = torch.cat([(log_scores(rows) + weights).argmax(1) for rows in blocks])
        vectors[level, :, x.shape[-1] + level] = (-weights * scale).clamp_min(0).sqrt()
        chosen = chosen + level_centroids[codes[:, level]]
    return vectors, codes


@torch.no_grad()
def start_head(head: CodeHead, vectors: Tensor, h: Tensor, target: Tensor, codes: Tensor, seed: int = 0) -> None:
    """Initialize a head in place from code vectors (L, K, D), states h (n, L, H), target vectors (n, D) and target codes (n, L)."""
    if isinstance(head, ResidualHead):
        head.vectors.copy_(vectors)
        mean = h.mean(0)
        # one W for all levels; the constant that each SID token adds to the states goes into the bias of its level
        weight, bias = ridge((h - mean).flatten(0, 1), target[:, None].expand(-1, h.shape[1], -1).flatten(0, 1), seed)
        head.projection.weight.copy_(weight)
        head.bias.copy_(bias - mean.to(weight) @ weight.T)
        device = head.bias.device  # the solutions above are computed on the CPU
        logits = head.teacher_logits(head.project(h.to(device)), codes.to(device)).cpu()
        for level in range(head.num_levels):
            head.log_temperature[level] = -_best_log_scale(logits[:, level], codes[:, level])
    if isinstance(head, ParallelHead):
        for level, linear in enumerate(head.levels):
            one_hot = torch.nn.functional.one_hot(codes[:, level], head.codebook_size).float()
            weight, bias = ridge(h[:, level], one_hot, seed)
            scale = math.exp(_best_log_scale(h[:, level] @ weight.T + bias, codes[:, level]))
            linear.weight.copy_(scale * weight)
            linear.bias.copy_(scale * bias)


def _best_log_scale(logits: Tensor, codes: Tensor) -> float:
    """Log of the factor on `logits` (n, K) that minimises the cross-entropy of `codes`, down to `MIN_CROSS_ENTROPY`.

    Without that limit, logits that fit every code would give a deterministic policy, which has no gradient and does not explore.
    """
    grid = torch.linspace(math.log(1e-2), math.log(1e5), 65)
    values = [code_cross_entropy(logits[:, None] * float(scale.exp()), codes[:, None]).item() for scale in grid]
    limit = max(min(values), MIN_CROSS_ENTROPY)
    return float(grid[next(index for index, value in enumerate(values) if value <= limit)])


def category_ids(items: Sequence[Item], num_levels: int) -> Tensor:
    """Ids (N, L) of category prefixes, the contrast positives of each level; -1 for an item without a path.

    Level l uses the prefix of depth min(l, depth of the item's path). Equal names under different parents get different ids.
    """
    known: dict[tuple[str, ...], int] = {}
    rows = [
        [
            known.setdefault(item.categories[: min(level, len(item.categories))], len(known)) if item.categories else -1
            for level in range(1, num_levels + 1)
        ]
        for item in items
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(items), num_levels)


def reconstruction_texts(items: Sequence[Item], mined: dict[str, MinedInterests], target: Literal["summary", "attributes"]) -> list[str]:
    """Target text of the reconstruction loss per item, "" where there is none. Summaries mined from behaviour are allowed as targets."""
    if target == "summary":
        return [mined[item.item_id].summary if item.item_id in mined else "" for item in items]
    return ["; ".join(part for part in (" > ".join(item.categories), attribute_text(item)) if part) for item in items]
