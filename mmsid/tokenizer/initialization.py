"""Closed-form initialization of the item tokenizer: target codes, code vectors, head and embedding projections.

The codebooks are Sinkhorn-balanced residual k-means in the space [content ; behaviour], of items with their own behaviour and, for a part
of them, with the behaviour that content predicts. Each code vector stores the price (dual variable of the Sinkhorn plan) of its code in an
extra coordinate per level: states are 0 there, code c is sqrt(price), so that greedy codes of single items are balanced, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from mmsid.catalog import Catalog, Item, Split, co_engagement
from mmsid.config import Section
from mmsid.progress import track
from mmsid.quantize import CoEngagementFactors, balanced_residual_kmeans
from mmsid.quantize.sinkhorn import column_log_weights
from mmsid.tokenizer.behaviour import ItemBehaviour, read_files, with_interactions
from mmsid.tokenizer.heads import CodeHead, ParallelHead, ResidualHead
from mmsid.tokenizer.inputs import ItemInput, MinedInterests, attribute_text
from mmsid.tokenizer.losses import code_cross_entropy
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.ridge import ridge

MIN_CROSS_ENTROPY = 0.25  # nats; cross-entropy of the target codes after initialization, a probability of about 0.78 each
LENGTH_ROWS = 512  # items on which the length of content states is measured
RIDGE_ROWS = 20_000  # states kept for the closed-form solutions: more rows cost RAM and hardly change them
CONTENT_READINGS = 0.2  # share of the items whose content reading joins the behaviour readings in the codebooks
SINKHORN_EPSILON = 0.03  # entropic regularisation, relative to the mean squared residual
SINKHORN_PASSES = 20


class StartSettings(Section):
    """Initialization and behaviour vectors.

    Attributes:
        mode: "balanced" is the closed-form initialization; "random" leaves the heads at random, as UniSID does.
        behaviour_dim: dimension of the factorised co-engagement.
        behaviour_weight: weight of behaviour beside content in the fused space; None chooses it on the inner held-out users.
        window: two items of a history co-engage if they are at most this many steps apart.
    """

    mode: Literal["balanced", "random"] = "balanced"
    behaviour_dim: int = Field(64, ge=1)
    behaviour_weight: float | None = Field(None, gt=0)
    window: int = Field(3, ge=1)


@dataclass
class Behaviour:
    """Behaviour of all N items in the fit histories.

    Attributes:
        pairs: (N, N) co-engagement weights; None without sequences.
        items: behaviour vectors (N, M) and interactions; M = 0 if behaviour is not used.
        factors: of `pairs`; None if the vectors are the user's own.
    """

    pairs: sparse.csr_matrix | None
    items: ItemBehaviour
    factors: CoEngagementFactors | None = None


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


def read_behaviour(
    catalog: Catalog, split: Split | None, settings: StartSettings, seed: int, source: str | Sequence[Path] = "coengagement"
) -> Behaviour:
    """Behaviour vectors of all items, from the histories of the fit users (90 % of them, train part) or from files.

    Args:
        source: "none"; "coengagement", within `window` steps, factorised by PPMI and SVD; or vector files.

    Raises:
        CatalogError: a file is unusable.
    """
    histories = split.fit_histories() if split is not None else []
    none = ItemBehaviour(np.zeros((len(catalog.items), 0), np.float32), np.zeros(len(catalog.items)))
    pairs = co_engagement(histories, len(catalog.items), settings.window, split.fit_weights()) if histories else None
    if source == "none":
        return Behaviour(pairs, none)
    if source != "coengagement":
        return Behaviour(pairs, read_files(source, catalog.item_ids, histories))
    if pairs is None:
        return Behaviour(None, none)
    factors = CoEngagementFactors.fit(pairs, settings.behaviour_dim, seed)
    return Behaviour(pairs, with_interactions(factors.vectors(pairs), histories), factors)


@torch.no_grad()
def read_states(tokenizer: ItemTokenizer, inputs: Sequence[ItemInput], batch_size: int, seed: int) -> ContentStates:
    """Read the content of all items once, in batches of similar text length."""
    tokenizer.eval()
    kept = np.sort(np.random.default_rng(seed).permutation(len(inputs))[:RIDGE_ROWS])
    index_of = {int(row): index for index, row in enumerate(kept)}
    pooled = np.zeros((len(inputs), tokenizer.content_size), np.float32)
    states = torch.zeros(len(kept), tokenizer.num_levels + 1, tokenizer.content_size)
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row].text))
    for start in track(range(0, len(order), batch_size), what="initial states", unit="batches"):
        rows = order[start : start + batch_size]
        batch = tokenizer.collate([inputs[row] for row in rows])
        output = tokenizer.content({key: value.to(tokenizer.device) for key, value in batch.items()})
        pooled[rows] = output.pooled.cpu().numpy()
        for i, row in enumerate(rows):
            if row in index_of:
                states[index_of[row]] = output.states[i].cpu()
    tokenizer.warn_of_unread_pictures()
    return ContentStates(pooled, kept, states)


@torch.no_grad()
def start_pictures(tokenizer: ItemTokenizer, inputs: Sequence[ItemInput], seed: int) -> dict[str, int] | None:
    """Read the pictures of all items and fit the picture input in place, to the length of the backbone's content states.

    Returns:
        Numbers of items (`picture_input.COUNTS`); None for a tokenizer without picture input.
    """
    if tokenizer.pictures is None:
        return None
    tokenizer.eval()
    drawn = np.sort(np.random.default_rng([seed, 29]).permutation(len(inputs))[:LENGTH_ROWS])
    pooled = []
    for start in range(0, len(drawn), 32):
        batch = tokenizer.backbone.collate([inputs[row] for row in drawn[start : start + 32]])
        pooled.append(tokenizer.backbone.read({key: value.to(tokenizer.device) for key, value in batch.items()}).pooled.cpu())
    states = torch.cat(pooled)
    if tokenizer.settings.backbone.kind != "text":  # `unit_content` subtracts the mean of these
        states = states - states.mean(0)
    length = float(states.square().sum(1).mean().sqrt())
    return tokenizer.pictures.fit(inputs, length or 1.0, seed)


def unit_content(pooled: np.ndarray, *, centre: bool) -> np.ndarray:
    """Pooled content states (N, H), scaled to rows of unit length.

    `centre` subtracts the mean content first, because the states of vision-language models, and many embeddings, share one dominant
    direction.
    """
    content = pooled - pooled.mean(0, keepdims=True) if centre else pooled
    return content / np.maximum(np.linalg.norm(content, axis=1, keepdims=True), 1e-12)


@torch.no_grad()
def balanced_start(
    tokenizer: ItemTokenizer, content: ContentStates, fused: np.ndarray, behaviour: ItemBehaviour, seed: int
) -> tuple[Tensor, Tensor]:
    """Cluster both readings of all items, and initialize the heads in place.

    The content reading is the ridge prediction of the fused space from pooled content. The behaviour reading replaces its behaviour
    coordinates as far as the item's behaviour is trusted. Codebooks of one reading alone cannot be used: content readings scored against
    centroids of the fused space collapse onto few codes (docs/experiments/tokenizer_start_and_losses.md).

    Residual head: code vectors = centroids with prices, W and b_l = ridge regression of the SID states on the content reading, t_l =
    the temperature of maximum likelihood of the target codes. Parallel head: ridge regression on one-hot target codes, with one scale
    per level chosen likewise. Embedding head: ridge regression of the EMB states on the fused space.

    Returns:
        codes: (N, L), balanced codes of the behaviour reading, the targets of training.
        target: (N, D), fused vectors; behaviour coordinates of items without behaviour are predicted ones.
    """
    settings, head = tokenizer.settings, tokenizer.head
    pooled, rows = torch.from_numpy(content.pooled), torch.from_numpy(content.rows)
    known = torch.from_numpy(behaviour.interactions[content.rows] > 0)
    fitted = known if bool(known.any()) else torch.ones_like(known)  # items without behaviour would pull predictions towards zero
    space = torch.from_numpy(fused)
    weight, bias = ridge(pooled[rows][fitted], space[rows][fitted], seed)
    predicted = pooled @ weight.T + bias
    width = space.shape[1] - behaviour.vectors.shape[1]
    if len(known) and bool((~torch.from_numpy(behaviour.interactions > 0)).any()):
        cold = torch.from_numpy(behaviour.interactions <= 0)
        space = torch.cat([space[:, :width], torch.where(cold[:, None], predicted[:, width:], space[:, width:])], 1)
    reading = predicted
    if isinstance(head, ResidualHead) and head.behaviour is not None:
        reading = head.behaviour(predicted[:, None], torch.from_numpy(behaviour.rows()))[:, 0]
    both = torch.cat([reading, predicted[content_sample(len(reading), seed)]])
    vectors, codes = priced_codebooks(both, settings.num_levels, settings.codebook_size, seed)
    codes = codes[: len(reading)]
    weight, bias = ridge(content.states[:, -1][fitted], space[rows][fitted], seed)
    tokenizer.emb_head.weight.copy_(weight)
    tokenizer.emb_head.bias.copy_(bias)
    target = append_price_coordinates(predicted[rows], settings.num_levels)
    start_head(head, vectors, content.states[:, :-1], target, codes[rows], seed, torch.from_numpy(behaviour.rows()[content.rows]))
    return codes, append_price_coordinates(space, settings.num_levels)


@torch.no_grad()
def refit_head(head: ResidualHead, content: Tensor, behaviour: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster both readings of trained states again. Code vectors and temperatures are set in place.

    The projection is set to 0 in the price coordinates.

    Args:
        content: (n, L, code_dim) content readings.
        behaviour: (n, M + 1) behaviour vectors and interactions; not read by a head without behaviour input.

    Returns:
        s: (n, L, code_dim), the behaviour readings. codes: (n, L), their balanced codes.
    """
    levels, device = head.num_levels, head.vectors.device
    head.projection.weight[-levels:] = 0
    head.bias[:, -levels:] = 0
    content = append_price_coordinates(content[..., :-levels], levels).to(device)
    s = content if head.behaviour is None else head.behaviour(content, behaviour.to(device))
    readings = s if head.behaviour is None else torch.cat([s, content[content_sample(len(s), seed)]])
    vectors, codes = priced_codebooks(readings[..., :-levels].cpu(), levels, head.codebook_size, seed)
    codes = codes[: len(s)]
    head.vectors.copy_(vectors)
    logits = head.teacher_logits(s, codes.to(device)) * head.log_temperature.exp()[None, :, None]
    for level in range(levels):
        head.log_temperature[level] = -_best_log_scale(logits[:, level].cpu(), codes[:, level])
    return s, codes


def content_sample(items: int, seed: int) -> Tensor:
    """Rows of the items whose content reading joins the codebooks.

    With all of them, half of every codebook would serve readings that are not published; with none, content readings would collapse.
    """
    chosen = np.random.default_rng([seed, 13]).permutation(items)[: math.ceil(CONTENT_READINGS * items)]
    return torch.from_numpy(np.sort(chosen))


def append_price_coordinates(x: Tensor, num_levels: int) -> Tensor:
    """(..., D) -> (..., D + L): zeros in the coordinates where code vectors store their prices."""
    return torch.cat([x, x.new_zeros(*x.shape[:-1], num_levels)], -1)


@torch.no_grad()
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
def start_head(
    head: CodeHead, vectors: Tensor, h: Tensor, target: Tensor, codes: Tensor, seed: int = 0, behaviour: Tensor | None = None
) -> None:
    """Initialize a head in place.

    Args:
        vectors: (L, K, D) code vectors.
        h: (n, L, H) states of the SID tokens.
        target: (n, D) content readings. codes: (n, L) target codes of the behaviour readings.
        behaviour: (n, M + 1) behaviour vectors and interactions, for a head with a behaviour input.
    """
    if isinstance(head, ResidualHead):
        head.vectors.copy_(vectors)
        mean = h.mean(0)
        # one W for all levels; the constant that each SID token adds to the states goes into the bias of its level
        weight, bias = ridge((h - mean).flatten(0, 1), target[:, None].expand(-1, h.shape[1], -1).flatten(0, 1), seed)
        head.projection.weight.copy_(weight)
        head.bias.copy_(bias - mean.to(weight) @ weight.T)
        device = head.bias.device  # the solutions above are computed on the CPU
        s = head.content(h.to(device))
        if head.behaviour is not None and behaviour is not None:
            s = head.behaviour(s, behaviour.to(device))
        logits = head.teacher_logits(s, codes.to(device)).cpu()
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
