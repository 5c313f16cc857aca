"""Where the tokenizer starts: the fused space, its balanced codes as first targets, and a closed-form start of the heads.

First measurements (design section 4): Sinkhorn-balanced residual codes of [text ; factorised train co-engagement] tie or beat
every learned variant tried. A tokenizer that reads content alone cannot give those codes, though: content explains a fifth of
the behaviour vectors' variance (amazon_scientific), and states regressed on the fused space but scored against *its* centroids
collapse (perplexity 211 / 12 / 72 of 256, more than half of all items in collision). So the clustering is of the *distilled*
space, the part of the fused space that content predicts: the ridge regression of pooled content on it. Its centroids are the
first code vectors, its codes the first targets, and the heads start as the ridge regression of the SID states on it. Training
goes on regressing on the whole fused space; at the end the head is given a regression of what it misses (`behaviour_regression`), and
`refit_head` clusters again what the states have become.

Balance for an item alone: Sinkhorn balances a table by a price per code; an argmax without prices loses it again. The prices are
kept in the code vectors themselves, as one more coordinate per level in which every state is 0 and code c of level l is
sqrt(price): -|r - e|^2 then holds -price, no other level sees it, and the policy keeps its form.

Behaviour comes from the train prefixes of the 90 % of users that models may be fitted on, and is a target only.
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

SHARP = 0.25  # nats; mean log-probability of the target codes at the start: about 0.78 each
RIDGE_ROWS = 20_000  # states kept for the closed-form start: beyond that the solution hardly moves, the memory does


class StartSettings(Section):
    """`behaviour_dim` 0 leaves co-engagement out. `mode: random` starts from nothing, as UniSID does."""

    mode: Literal["balanced", "random"] = "balanced"
    behaviour_dim: int = Field(64, ge=0)
    behaviour_weight: float = Field(1.0, ge=0)
    window: int = Field(3, ge=1)


@dataclass
class Behaviour:
    """Co-engagement of the fit histories: `pairs` (N, N) weights, `vectors` (N, M); None and (N, 0) without sequences.
    `interactions` (N,): how often each item stands in them."""

    pairs: sparse.csr_matrix | None
    vectors: np.ndarray
    interactions: np.ndarray


@dataclass
class ContentStates:
    """One pass of the untrained backbone over all items: `pooled` (N, H) mean content states; `rows` (n,) and `states`
    (n, L + 1, H) of a sample for the closed-form start."""

    pooled: np.ndarray
    rows: np.ndarray
    states: Tensor


def read_behaviour(catalog: Catalog, split: Split | None, settings: StartSettings, seed: int) -> Behaviour:
    """Co-engagement within `window` steps of the fit histories, factorised (PPMI, SVD)."""
    histories = split.fit_histories() if split is not None else []
    if not histories or settings.behaviour_dim == 0 or settings.behaviour_weight == 0:
        return Behaviour(None, np.zeros((len(catalog.items), 0), np.float32), np.zeros(len(catalog.items), np.int64))
    pairs = co_engagement(histories, len(catalog.items), settings.window)
    interactions = np.bincount(np.concatenate(histories), minlength=len(catalog.items))
    return Behaviour(pairs, ppmi_svd(pairs, settings.behaviour_dim, seed=seed), interactions)


@torch.no_grad()
def read_states(tokenizer: ItemTokenizer, inputs: Sequence[ItemInput], batch_size: int, seed: int) -> ContentStates:
    """Run the backbone once over all items; rows of like length together."""
    tokenizer.eval()
    kept = np.sort(np.random.default_rng(seed).permutation(len(inputs))[:RIDGE_ROWS])
    place = {int(row): i for i, row in enumerate(kept)}
    pooled = np.zeros((len(inputs), tokenizer.backbone.hidden_size), np.float32)
    states = torch.zeros(len(kept), tokenizer.num_levels + 1, tokenizer.backbone.hidden_size)
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row].text))
    for start in track(range(0, len(order), batch_size), what="first reading", unit="batches"):
        rows = order[start : start + batch_size]
        batch = tokenizer.backbone.collate([inputs[row] for row in rows])
        reading = tokenizer.backbone.read({key: value.to(tokenizer.device) for key, value in batch.items()})
        pooled[rows] = reading.pooled.cpu().numpy()
        for i, row in enumerate(rows):
            if row in place:
                states[place[row]] = reading.states[i].cpu()
    return ContentStates(pooled, kept, states)


def fused_space(pooled: np.ndarray, behaviour: Behaviour, weight: float, *, centre: bool) -> np.ndarray:
    """[content, rows of unit length ; weight x behaviour]: (N, H + M). `centre` takes the mean content away first: the states of
    vision-language bodies point nearly all the same way."""
    content = pooled - pooled.mean(0, keepdims=True) if centre else pooled
    content = content / np.maximum(np.linalg.norm(content, axis=1, keepdims=True), 1e-12)
    return fuse(content, behaviour.vectors, weight)


def ridge(x: Tensor, y: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """y ~ x W^T + b with the penalty that predicts a held-out fifth best, refitted on all rows: x (n, H), y (n, D) -> W (D, H), b (D,).

    The penalty is a multiple of the mean variance of x, tried from 1e-4 to 100.
    """
    x, y = x.double(), y.double()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    cut = max(1, len(x) // 5)
    held, fit = order[:cut], order[cut:] if len(x) > 5 else order
    solve = _ridge_path(x[fit], y[fit])
    mean_x, mean_y = x[fit].mean(0), y[fit].mean(0)
    strengths = [10.0**power for power in (-4, -3, -2, -1, 0, 1, 2)]
    errors = [((x[held] - mean_x) @ solve(strength) + mean_y - y[held]).square().sum().item() for strength in strengths]
    weight = _ridge_path(x, y)(strengths[int(np.argmin(errors))])
    return weight.T.float().contiguous(), (y.mean(0) - x.mean(0) @ weight).float()


def _ridge_path(x: Tensor, y: Tensor) -> Callable[[float], Tensor]:
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    moment = vectors.T @ (centred.T @ (y - y.mean(0)))
    scale = values.clamp_min(0).mean().clamp_min(1e-12)
    return lambda strength: vectors @ (moment / (values.clamp_min(0) + strength * scale)[:, None])


def balanced_start(tokenizer: ItemTokenizer, readings: ContentStates, fused: np.ndarray, seed: int) -> Tensor:
    """Cluster the distilled space, start the heads from it in place, and return the target codes (N, L).

    Residual head: code vectors = centroids and prices, W and b_l = ridge regression of the SID states on the distilled space,
    t_l = the temperature under which the target codes are likeliest. Parallel head: ridge regression on the one-hot target
    codes, one scale per level chosen the same way. Embedding head: ridge regression of the EMB state on the fused space.
    """
    settings = tokenizer.settings
    pooled, rows = torch.from_numpy(readings.pooled), torch.from_numpy(readings.rows)
    weight, bias = ridge(pooled[rows], torch.from_numpy(fused)[rows], seed)
    distilled = pooled @ weight.T + bias
    vectors, codes = priced_codebooks(distilled, settings.num_levels, settings.codebook_size, seed)
    with torch.no_grad():
        weight, bias = ridge(readings.states[:, -1], torch.from_numpy(fused)[rows], seed)
        tokenizer.emb_head.weight.copy_(weight)
        tokenizer.emb_head.bias.copy_(bias)
        start_head(
            tokenizer.head, vectors, readings.states[:, :-1], with_price_places(distilled[rows], settings.num_levels), codes[rows], seed
        )
    return codes


@torch.no_grad()
def refit_head(head: ResidualHead, s: Tensor, seed: int) -> Tensor:
    """Cluster anew what the states have become: s (n, L, code_dim) -> balanced codes (n, L); vectors and temperatures in place.

    What the projection puts into the places of the prices is taken out of it.
    """
    places = head.num_levels
    head.projection.weight[-places:] = 0
    head.bias[:, -places:] = 0
    content = s[..., :-places].cpu()
    vectors, codes = priced_codebooks(content, head.num_levels, head.codebook_size, seed)
    head.vectors.copy_(vectors)
    s = with_price_places(content, places).to(head.vectors.device)
    logits = head.teacher_logits(s, codes.to(s.device)) * head.log_temperature.exp()[None, :, None]
    for level in range(places):
        head.log_temperature[level] = -_likeliest_scale(logits[:, level].cpu(), codes[:, level])
    return codes


def with_price_places(x: Tensor, num_levels: int) -> Tensor:
    """(..., D) -> (..., D + L): zeros where the code vectors hold their prices."""
    return torch.cat([x, x.new_zeros(*x.shape[:-1], num_levels)], -1)


def priced_codebooks(
    x: Tensor, num_levels: int, codebook_size: int, seed: int, *, epsilon: float = 0.03, passes: int = 20
) -> tuple[Tensor, Tensor]:
    """Balanced residual k-means whose greedy codes are balanced: vectors (L, K, D + L) with their prices, codes (N, L).

    x is (N, D), or (N, L, D) with a vector per level (the centroids are then fitted on the mean over levels). At each level the
    prices are the column weights of the Sinkhorn plan of the squared distances, and the codes their argmax.
    """
    per_level = x[:, None].expand(-1, num_levels, -1) if x.dim() == 2 else x
    centroids = balanced_residual_kmeans(per_level.mean(1), num_levels, codebook_size, seed).codebooks.vectors
    vectors = with_price_places(centroids, num_levels)
    codes = torch.zeros(len(x), num_levels, dtype=torch.int64)
    chosen = torch.zeros(len(x), x.shape[-1])
    for level in range(num_levels):
        residual, table = per_level[:, level] - chosen, centroids[level]
        scale = epsilon * residual.square().sum(1).mean().clamp_min(1e-12)
        blocks = [slice(start, start + 8192) for start in range(0, len(x), 8192)]

        def fit(rows: slice, residual: Tensor = residual, table: Tensor = table, scale: Tensor = scale) -> Tensor:
            scores = (2 * residual[rows] @ table.T - table.square().sum(1)) / scale
            return scores - scores.amax(1, keepdim=True)

        weights = column_log_weights(
            lambda fit=fit, blocks=blocks: (fit(rows).exp() for rows in blocks), len(x), codebook_size, passes
        ).float()
        codes[:, level] = torch.cat([(fit(rows) + weights).argmax(1) for rows in blocks])
        vectors[level, :, x.shape[-1] + level] = (-weights * scale).clamp_min(0).sqrt()
        chosen = chosen + table[codes[:, level]]
    return vectors, codes


@torch.no_grad()
def start_head(head: CodeHead, vectors: Tensor, h: Tensor, target: Tensor, codes: Tensor, seed: int = 0) -> None:
    """Start a head in place from code vectors (L, K, D), states h (n, L, H), fused vectors (n, D) and target codes (n, L)."""
    if isinstance(head, ResidualHead):
        head.vectors.copy_(vectors)
        mean = h.mean(0)
        # one W for all levels: what each SID token adds to every item's state is taken up by the level's own bias
        weight, bias = ridge((h - mean).flatten(0, 1), target[:, None].expand(-1, h.shape[1], -1).flatten(0, 1), seed)
        head.projection.weight.copy_(weight)
        head.bias.copy_(bias - mean.to(weight) @ weight.T)
        device = head.bias.device  # what is solved above stays on the CPU, wherever the head is
        logits = head.teacher_logits(head.project(h.to(device)), codes.to(device)).cpu()
        for level in range(head.num_levels):
            head.log_temperature[level] = -_likeliest_scale(logits[:, level], codes[:, level])
    if isinstance(head, ParallelHead):
        for level, linear in enumerate(head.levels):
            hot = torch.nn.functional.one_hot(codes[:, level], head.codebook_size).float()
            weight, bias = ridge(h[:, level], hot, seed)
            scale = math.exp(_likeliest_scale(h[:, level] @ weight.T + bias, codes[:, level]))
            linear.weight.copy_(scale * weight)
            linear.bias.copy_(scale * bias)


def _likeliest_scale(logits: Tensor, codes: Tensor) -> float:
    """log of the factor on `logits` (n, K) that makes `codes` likeliest, but no greater than brings their mean -log pi to `SHARP`:
    where every code fits, the likeliest policy is a hard one, which no gradient and no exploration could move. Grid: 7 decades."""
    grid = torch.linspace(math.log(1e-2), math.log(1e5), 65)
    values = [code_cross_entropy(logits[:, None] * float(scale.exp()), codes[:, None]).item() for scale in grid]
    least = max(min(values), SHARP)
    return float(grid[next(place for place, value in enumerate(values) if value <= least)])


def category_ids(items: Sequence[Item], num_levels: int) -> Tensor:
    """(N, L) ids of the category prefix that each level's positives share: level l uses depth min(l, depth of the item's path),
    -1 without a path. Prefixes are compared whole, so that equal names under different parents differ."""
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
    """What is to be rebuilt per item; '' where it is missing. Summaries may stem from any miner: they are targets only."""
    if target == "summary":
        return [mined[item.item_id].summary if item.item_id in mined else "" for item in items]
    return ["; ".join(part for part in (" > ".join(item.categories), attribute_text(item)) if part) for item in items]
