"""From raw codes to a SID folder: collision handling, intrinsic figures on the held-out users, exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmsid.artifacts import write_tensors
from mmsid.catalog import Catalog, Split, adjacent_pairs
from mmsid.errors import MmsidError
from mmsid.quantize import ResidualCodebooks
from mmsid.quantize.scores import best_first
from mmsid.sids import Resolution, SidTable, intrinsic_metrics, resolve, write_sid_folder
from mmsid.sids.append import append_codes
from mmsid.sids.collisions import Policy
from mmsid.sids.semantics import fidelity
from mmsid.tokenizer.heads import CodeHead, ResidualHead
from mmsid.tokenizer.published_sids import RETIRED, Published

_BEAMS = (16, 1024)


class Scores(Protocol):
    """What collision handling asks of a quantizer (`mmsid.sids.collisions`)."""

    def last_scores(self, rows: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """(n,) item rows and (n, L-1) prefixes -> (n, K) log pi of the last code."""

    def prefix_candidates(self, row: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """The item's prefixes with their joint log pi, best first."""


class HeadScores:
    """A tokenizer's head as collision handling sees it. `scores(rows)` gives what the head scores with, (n, L, D): from memory, from
    a file, or encoded anew."""

    def __init__(self, head: CodeHead, scores: Callable[[np.ndarray], Tensor]) -> None:
        self.head, self.scores = head.cpu().eval(), scores

    @torch.no_grad()
    def last_scores(self, rows: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """(n,) item rows and (n, L-1) prefixes -> (n, K) float64 log pi of the last code."""
        s = self.scores(np.asarray(rows, dtype=np.int64))
        logits = self.head.level_logits(s, torch.from_numpy(np.asarray(prefixes, dtype=np.int64)))
        return logits.double().log_softmax(-1).numpy()

    @torch.no_grad()
    def prefix_candidates(self, row: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """The item's prefixes with their joint log pi, best first, by a narrow beam, then a wide one."""
        s = self.scores(np.array([row]))
        seen: set[tuple[int, ...]] = set()
        for beam in _BEAMS:
            prefixes, joint = torch.zeros(1, 1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
            for _ in range(self.head.num_levels - 1):
                step = self.head.level_logits(s, prefixes)[0].double().log_softmax(-1)
                total = (joint[:, None] + step).flatten()
                kept = best_first(total, beam)
                parent, code = kept // step.shape[1], kept % step.shape[1]
                prefixes, joint = torch.cat([prefixes[0, parent], code[:, None]], 1)[None], total[kept]
            for codes, value in zip(prefixes[0].tolist(), joint.tolist(), strict=True):
                if tuple(codes) not in seen:
                    seen.add(tuple(codes))
                    yield tuple(codes), value


def publish(
    folder: Path,
    catalog: Catalog,
    split: Split | None,
    raw_codes: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    collisions: Policy,
    scores: Scores | None,
    published: Published | None = None,
    margin: np.ndarray | None = None,
    embeddings: np.ndarray | None = None,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
    tokenizer_sha256: str = "",
    seed: int = 0,
) -> tuple[SidTable, dict[str, Any]]:
    """Resolve collisions of raw codes (N, L), measure, and write a SID folder; returns the table and its figures.

    `scores` is needed by the policy "relocate" only. `published`: SIDs that must not move (the rows of its items in
    `raw_codes` are theirs); `scores` is then asked about new items only, and items that left are written to `retired.parquet`.
    `embeddings` (N, D), if given, are written as `embeddings.safetensors` (row
    order = the table's) and measured. `decode` turns codes (N, L) into vectors, for retrieval by codes. Pairs come from the inner
    held-out users; categories from the catalogue.
    """
    hashes = [item.content_sha256 for item in catalog.items]
    if published is None:
        asked = (None, None) if scores is None or collisions != "relocate" else (scores.last_scores, scores.prefix_candidates)
        resolution = resolve(collisions, raw_codes, hashes, codebook_sizes, *asked)
    else:
        resolution = _beside(published, catalog, raw_codes, codebook_sizes, collisions, scores)
    table = SidTable(
        [item.item_id for item in catalog.items],
        resolution.codes,
        raw_codes,
        resolution.suffix,
        np.full(len(raw_codes), np.nan, np.float32) if margin is None else margin,
        codebook_sizes,
        tokenizer_sha256,
        catalog.sha256,
    )
    held_out = split.held_out_histories() if split is not None else []
    pairs = adjacent_pairs(held_out) if held_out else None
    categories = [item.categories for item in catalog.items]
    metrics = intrinsic_metrics(
        table,
        categories if any(categories) else None,
        pairs,
        embeddings=embeddings,
        content_hashes=hashes,
        seed=seed,
        decoded=None if decode is None or pairs is None else decode(table.codes),
    )
    metrics["collisions"] = {"policy": collisions, "moved": resolution.moved, "spilled": resolution.spilled}
    write_sid_folder(folder, table, metrics)
    if embeddings is not None:
        write_tensors(Path(folder) / "embeddings.safetensors", {"embeddings": torch.from_numpy(np.ascontiguousarray(embeddings))})
    if published is not None and (gone := published.left_behind(table.item_ids)) is not None:
        gone.save(Path(folder) / RETIRED)
    return table, metrics


def _beside(
    published: Published, catalog: Catalog, raw_codes: np.ndarray, sizes: tuple[int, ...], policy: Policy, scores: Scores | None
) -> Resolution:
    """Codes of a grown catalogue, those of published items as they are."""
    if scores is None:
        raise MmsidError("items can only be appended with the scores of the tokenizer that published the others")
    item_ids = [item.item_id for item in catalog.items]
    before, gone = published.codes_of(item_ids), published.left_behind(item_ids)
    codes = append_codes(
        policy,
        raw_codes,
        [item.content_sha256 for item in catalog.items],
        before,
        sizes,
        scores.last_scores,
        scores.prefix_candidates,
        None if gone is None else gone.codes,
    )
    spilled = (codes[:, :-1] != raw_codes[:, :-1]).any(axis=1)
    return Resolution(codes, None, int((codes != raw_codes).any(axis=1).sum()), int(spilled.sum()))


def head_decoder(head: CodeHead) -> Callable[[np.ndarray], np.ndarray] | None:
    """Codes (N, L) -> the sum of their code vectors without the places of the prices; None for a head without vectors."""
    if not isinstance(head, ResidualHead):
        return None
    kept = head.vectors.shape[-1] - head.num_levels if head.vectors.shape[-1] > head.num_levels else head.vectors.shape[-1]
    codebooks = ResidualCodebooks(head.vectors.detach().cpu().float()[..., :kept].contiguous())
    return lambda codes: codebooks.decode(codes).numpy()


def reconstruction_figures(head: CodeHead, s: np.ndarray, table: SidTable) -> dict[str, Any] | None:
    """How well published and raw codes rebuild what the last level quantises, s_L (N, D); None for a head without vectors.

    The last L coordinates are left out: code vectors hold their prices there, which rebuild nothing (see `targets`).
    """
    if not isinstance(head, ResidualHead) or s.shape[1] <= head.num_levels:
        return None
    vectors, s = head.vectors.detach().cpu().numpy()[..., : -head.num_levels], s[:, : -head.num_levels]
    return {"fidelity": fidelity(s, vectors, table.codes), "fidelity_raw": fidelity(s, vectors, table.raw_codes)}
