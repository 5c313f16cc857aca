"""From raw codes to a SID folder: collision handling, intrinsic metrics on held-out users, exports."""

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
from mmsid.quantize.scores import Beam
from mmsid.sids import Resolution, SidTable, intrinsic_metrics, resolve, write_sid_folder
from mmsid.sids.append import append_codes
from mmsid.sids.collisions import Policy
from mmsid.sids.semantics import fidelity
from mmsid.tokenizer.heads import CodeHead, ResidualHead
from mmsid.tokenizer.published_sids import RETIRED, Published

_BEAMS = (16, 1024)  # widths of the prefix searches, tried in this order
_BEAM_BYTES = 64 * 2**20  # float64 scores of one block of items in a search


class Scores(Protocol):
    """Code scores that collision handling needs from a quantizer (`mmsid.sids.collisions`)."""

    def last_scores(self, rows: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """Log pi (n, K) of the last code for item rows (n,) and prefixes (n, L-1)."""

    def prefix_candidates(self, row: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """Prefixes of an item with their joint log pi, best first."""


class HeadScores:
    """`Scores` of a SID head.

    Args:
        head: is moved to the CPU.
        scores: returns the projected states (n, L, D) of item rows (n,).
    """

    def __init__(self, head: CodeHead, scores: Callable[[np.ndarray], Tensor]) -> None:
        self.head, self.scores = head.cpu().eval(), scores

    @torch.no_grad()
    def last_scores(self, rows: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """Log pi (n, K) of the last code, float64, for item rows (n,) and prefixes (n, L-1)."""
        s = self.scores(np.asarray(rows, dtype=np.int64))
        logits = self.head.level_logits(s, torch.from_numpy(np.asarray(prefixes, dtype=np.int64)))
        return logits.double().log_softmax(-1).numpy()

    @torch.no_grad()
    def prefix_candidates(self, row: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """Prefixes of an item with their joint log pi, best first: those of a narrow beam search, then those of a wide one."""
        s = self.scores(np.array([row]))
        seen: set[tuple[int, ...]] = set()
        for beam in _BEAMS:
            found = self._search(s, beam)
            for codes, value in zip(found.prefixes[0].tolist(), found.log_prob[0].tolist(), strict=True):
                if tuple(codes) not in seen:
                    seen.add(tuple(codes))
                    yield tuple(codes), value

    @torch.no_grad()
    def prefix_beams(self, rows: np.ndarray, beam: int) -> np.ndarray:
        """Best prefixes of several items by one beam search: (n,) item rows -> (n, b, L-1) int64, best first, b <= beam."""
        size, levels = self.head.codebook_size, self.head.num_levels
        width = min(beam, size ** max(levels - 2, 0))
        parts = []
        for part in np.array_split(rows, max(1, -(-len(rows) * width * size * 8 // _BEAM_BYTES))):
            parts.append(self._search(self.scores(np.asarray(part, dtype=np.int64)), beam).prefixes.numpy())
        return np.concatenate(parts)

    def _search(self, s: Tensor, beam: int) -> Beam:
        found = Beam.start(len(s))
        for _ in range(self.head.num_levels - 1):
            found = found.continued(self.head.level_logits(s, found.prefixes).double().log_softmax(-1), beam)
        return found


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
    source: np.ndarray | None = None,
    moving: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[SidTable, dict[str, Any]]:
    """Resolve collisions of raw codes (N, L), compute metrics, and write a SID folder.

    Args:
        folder: the SID folder to write.
        split: its inner held-out users give the item pairs of the metrics.
        scores: needed by the policy "relocate", and with `published`.
        published: SIDs that must not change; the rows of its items in `raw_codes` are the published ones. `scores` is then used for
            new items only, and removed items are written to `retired.parquet`.
        margin: (N,) margins of the raw codes; NaN by default.
        embeddings: (N, D), written as `embeddings.safetensors` in the order of the table, and measured.
        source: (N,) the reading that gave each item its codes; see `SidTable`.
        moving: (N,) bool, published items that get new codes. No other item of this call gets their old ones.
        decode: turns codes (N, L) into vectors, for retrieval by codes.

    Returns:
        The table and its metrics.
    """
    hashes = catalog.content_hashes
    if published is None:
        functions = (None,) * 3
        if scores is not None and collisions == "relocate":
            functions = (scores.last_scores, scores.prefix_candidates, getattr(scores, "prefix_beams", None))
        resolution = resolve(collisions, raw_codes, hashes, codebook_sizes, *functions)
    else:
        resolution = _append(published, catalog, raw_codes, codebook_sizes, collisions, scores, moving)
    table = SidTable(
        catalog.item_ids,
        resolution.codes,
        raw_codes,
        resolution.suffix,
        np.full(len(raw_codes), np.nan, np.float32) if margin is None else margin,
        codebook_sizes,
        tokenizer_sha256,
        catalog.sha256,
        source,
        catalog.integer_ids,
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
    if published is not None and (retired := published.removed(table.item_ids)) is not None:
        retired.save(Path(folder) / RETIRED)
    return table, metrics


def _append(
    published: Published,
    catalog: Catalog,
    raw_codes: np.ndarray,
    sizes: tuple[int, ...],
    policy: Policy,
    scores: Scores | None,
    moving: np.ndarray | None,
) -> Resolution:
    """Codes of a grown catalogue: published items keep theirs, except the `moving` ones (N,)."""
    if scores is None:
        raise MmsidError("publish: `published` needs `scores` of the tokenizer that published these SIDs; pass both")
    item_ids = catalog.item_ids
    published_codes, retired = published.codes_of(item_ids), published.removed(item_ids)
    taken = [] if retired is None else [retired.codes]
    if moving is not None:
        taken.append(published_codes[moving])
        published_codes = np.where(moving[:, None], -1, published_codes)
    codes = append_codes(
        policy,
        raw_codes,
        catalog.content_hashes,
        published_codes,
        sizes,
        scores.last_scores,
        scores.prefix_candidates,
        np.concatenate(taken) if taken else None,
    )
    spilled = (codes[:, :-1] != raw_codes[:, :-1]).any(axis=1)
    return Resolution(codes, None, int((codes != raw_codes).any(axis=1).sum()), int(spilled.sum()))


def head_decoder(head: CodeHead) -> Callable[[np.ndarray], np.ndarray] | None:
    """Function from codes (N, L) to the sums of their code vectors, without price coordinates; None for a head without code vectors."""
    if not isinstance(head, ResidualHead):
        return None
    size = head.vectors.shape[-1] - head.num_levels if head.vectors.shape[-1] > head.num_levels else head.vectors.shape[-1]
    codebooks = ResidualCodebooks(head.vectors.detach().cpu().float()[..., :size].contiguous())
    return lambda codes: codebooks.decode(codes).numpy()


def reconstruction_figures(head: CodeHead, s: np.ndarray, table: SidTable) -> dict[str, Any] | None:
    """Reconstruction error of published and raw codes on the last projected states s (N, D); None for a head without code vectors.

    The last L coordinates are left out, because code vectors store their prices there (`mmsid.tokenizer.initialization`).
    """
    if not isinstance(head, ResidualHead) or s.shape[1] <= head.num_levels:
        return None
    vectors, s = head.vectors.detach().cpu().numpy()[..., : -head.num_levels], s[:, : -head.num_levels]
    return {"fidelity": fidelity(s, vectors, table.codes), "fidelity_raw": fidelity(s, vectors, table.raw_codes)}
