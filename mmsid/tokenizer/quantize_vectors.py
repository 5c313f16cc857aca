"""Stage `quantize`: Semantic IDs from ready-made vectors, without a catalogue and without training a tokenizer.

The vectors are read once, in blocks, into one memory-mapped matrix (`mmsid.tokenizer.vector_space`). Codebooks are fitted on all of them
or, for large sets, on a sample; codes are assigned in blocks; collisions are resolved as in stage `assign`. Memory holds the codes and
what collision handling needs, not the vectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator

from mmsid.artifacts import write_table, write_text, writing
from mmsid.catalog.vector_files import VectorFiles, open_vectors
from mmsid.catalog.vector_parts import open_parts
from mmsid.config import StageConfig
from mmsid.errors import ConfigError
from mmsid.progress import done, track
from mmsid.quantize import CodebookScores, Quantizer, fit_quantizer
from mmsid.quantize.codebooks import row_blocks
from mmsid.quantize.fit import QuantizerName
from mmsid.quantize.sizes import Sizes, propose, reason, sizes_table
from mmsid.sids import Resolution, SidTable, intrinsic_metrics, resolve, write_sid_folder
from mmsid.sids.collisions import Policy
from mmsid.sids.semantics import fidelity, nearest_neighbour_lcp
from mmsid.sids.table import BEHAVIOUR, CONTENT
from mmsid.tokenizer.quantize_report import REPORT, quantize_report
from mmsid.tokenizer.vector_space import EMBEDDINGS, BehaviourLookup, MatrixWriter, VectorSpace, write_space

PROBLEMS = "problems.parquet"
_LATENTS, _BEHAVIOUR = "latents.scratch", "behaviour.scratch"
_FIT_ROWS, _FIT_ROWS_PER_CODE, _FIT_BYTES = 100_000, 256, 2**30
_MEASURED_ITEMS = 50_000  # items on which reconstruction and nearest neighbours are measured
_BLOCK_ROWS = 16_384


class QuantizeConfig(StageConfig):
    """Configuration of `quantize`.

    Attributes:
        vectors: parquet files with a column of ids and a column of vectors, `.npy` matrices, folders of parquet files, folders of
            `datasets.save_to_disk`; read one after another. Vectors are normalised to norm 1.
        ids: a file of ids, one per row (.parquet, .csv, .jsonl, .txt, .npy); default: the column `id_column`.
        id_column, vector_column: default: `item_id`, and `vector` or the only column with lists of numbers.
        behaviour: a file of `item_id` and `vector`, for example two-tower or graph embeddings, which is fused with the vectors as
            [vector ; behaviour_weight x behaviour], both of norm 1. Items without a row are read by their vector alone.
        behaviour_weight: weight of the behaviour vectors beside the others.
        method: quantizer: `balanced_rq` (residual k-means with evenly used codes), `rq_kmeans` or `rq_vae`.
        codebook_size, num_levels: default: proposed from the number of items (`mmsid.quantize.sizes`).
        fit_rows: vectors that the codebooks are fitted on; default: 256 per code, at least 100,000, at most 1 GB. If that is all of them,
            the codes of `balanced_rq` are the balanced ones of the fit; otherwise every vector gets its nearest codes.
        collisions: policy for items with equal raw codes.
        array_sha256: hash of vectors that were passed from Python instead of files.
    """

    vectors: tuple[Path, ...] = ()
    ids: Path | None = None
    id_column: str | None = None
    vector_column: str | None = None
    behaviour: Path | None = None
    behaviour_weight: float = Field(1.0, ge=0)
    method: QuantizerName = "balanced_rq"
    codebook_size: int | None = Field(None, ge=2)
    num_levels: int | None = Field(None, ge=1, le=8)
    collisions: Policy = "relocate"
    fit_rows: int | None = Field(None, ge=1)
    array_sha256: str = ""

    def inputs(self) -> dict[str, Path | None]:
        """The files of the vectors, of the behaviour vectors, and of the ids."""
        parts = {"vectors": open_parts(self.vectors, self.vector_column, config_key="vectors")}
        if self.behaviour is not None:
            parts["behaviour"] = open_parts([self.behaviour], None, config_key="behaviour")
        found: dict[str, Path | None] = {"ids": self.ids}
        for name, opened in parts.items():
            files = [file for part in opened if part.num_rows for file in part.files]
            found |= {f"{name} {number}": file for number, file in enumerate(files, start=1)}
        return found

    @field_validator("vectors", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value


class RawCodes(NamedTuple):
    """Codes before collision handling.

    Attributes:
        codes: (n, L) int64. margin: (n,) float32.
        quantised: (n, D') the vectors that the codebooks approximate, memory-mapped.
        scores: log pi of the codes, for collision handling.
    """

    codes: np.ndarray
    margin: np.ndarray
    quantised: np.ndarray
    scores: CodebookScores


def run(config: QuantizeConfig, files: VectorFiles | None = None) -> Path:
    """Write a SID folder to `config.out`: what `assign` writes, and `codebooks.safetensors`, `problems.parquet`, `report.md`.

    Args:
        files: vectors that are open already (`vectors_in_memory`), instead of `config.vectors`.

    Raises:
        CatalogError: vectors or ids cannot be read, or more than half of the vectors are unusable.
        ConfigError: no vectors are named, or there are fewer SIDs than items.
        ArtifactError: `config.out` is finished already, or cannot be written.
    """
    if files is None:
        columns = {"id_column": config.id_column, "vector_column": config.vector_column}
        files = open_vectors(config.vectors, config.ids, **columns)
    behaviour_files = None if config.behaviour is None else open_vectors([config.behaviour], config_key="behaviour")
    sizes = checked_sizes(config, len(files))
    for note in files.notes:
        done(f"quantize: {note}")
    with writing(config.out, stage="quantize", config=config, inputs=config.inputs()) as draft:
        draft.scratch |= {_LATENTS, _BEHAVIOUR}
        behaviour = None if behaviour_files is None else BehaviourLookup(behaviour_files, files.ids, draft.path / _BEHAVIOUR)
        space = write_space(files, draft.path / EMBEDDINGS, behaviour, config.behaviour_weight)
        quantizer, rows = fit(config, sizes, space)
        raw = assign_codes(quantizer, space, rows, draft.path / _LATENTS)
        resolution = resolve_codes(config, sizes, space, raw)
        table = sid_table(config, sizes, files, space, raw, resolution)
        metrics = measure(config, table, space, quantizer, raw, resolution)
        metrics["fit_rows"] = len(rows)
        write_sid_folder(draft.path, table, metrics)
        quantizer.save(draft.path)
        write_table(draft.path / PROBLEMS, space.problems)
        notes = [*files.notes, *(behaviour.notes if behaviour else [])]
        given = (config.codebook_size, config.num_levels)
        write_text(draft.path / REPORT, quantize_report(config.method, sizes, given, files, space, metrics, notes))
        draft.counts |= {"in": len(files), "ok": len(table), "quarantined": len(space.problems)}
        draft.counts["exact_duplicates"] = metrics["published"]["exact_duplicates"]
        if space.with_behaviour is not None:
            draft.counts["behaviour"] = int(space.with_behaviour.sum())
        draft.extra |= {"collisions": metrics["collisions"], "codebook_size": sizes.codebook_size, "num_levels": sizes.num_levels}
    left_out = f", {len(space.problems):,} unusable vectors are listed in {PROBLEMS}" if len(space.problems) else ""
    done(f"quantize: wrote Semantic IDs of {len(table):,} items, {resolution.moved:,} relocated{left_out}, to {config.out}")
    return config.out


def checked_sizes(config: QuantizeConfig, num_items: int) -> Sizes:
    """Codebook size and number of levels; prints the proposal and its alternatives if one of them is not given.

    Raises:
        ConfigError: collisions are to be relocated, and there are fewer SIDs than items.
    """
    sizes = propose(num_items, config.codebook_size, config.num_levels)
    if config.collisions == "relocate" and num_items > sizes.capacity:
        better = propose(num_items)
        raise ConfigError(
            f"quantize: {num_items:,} items, but {sizes.num_levels} levels of {sizes.codebook_size:,} codes give {sizes.capacity:,} SIDs; "
            f"raise codebook_size or num_levels, or leave them out (proposal: {better.num_levels} levels of {better.codebook_size:,} codes)"
        )
    if config.codebook_size is None or config.num_levels is None:
        done(f"quantize: {reason(sizes, config.codebook_size, config.num_levels)}\n{sizes_table(sizes)}")
    return sizes


def fit(config: QuantizeConfig, sizes: Sizes, space: VectorSpace) -> tuple[Quantizer, np.ndarray]:
    """Fit the codebooks on all vectors or on a sample. Returns them and the rows of the fit."""
    limit = min(max(_FIT_ROWS, _FIT_ROWS_PER_CODE * sizes.codebook_size), _FIT_BYTES // (4 * space.values.shape[1]))
    rows = space.sample(config.fit_rows or limit, config.seed)
    sample = space.values if len(rows) == len(space.values) else np.asarray(space.values[rows])
    done(
        f"quantize: fitting {config.method}, {sizes.num_levels} levels of {sizes.codebook_size:,} codes, on {len(rows):,} of "
        f"{len(space.values):,} vectors of dimension {space.values.shape[1]}"
    )
    return fit_quantizer(config.method, sample, sizes.num_levels, sizes.codebook_size, config.seed), rows


def assign_codes(quantizer: Quantizer, space: VectorSpace, rows: np.ndarray, latents: Path) -> RawCodes:
    """Codes and margins of all vectors, block by block.

    Args:
        rows: rows of the fit. If they are all rows, their codes are those of the fit.
        latents: scratch file for the latents of `rq_vae`.
    """
    if len(rows) == len(space.values):
        scores = CodebookScores(quantizer.codebooks, quantizer.quantised)
        return RawCodes(quantizer.codes.numpy(), scores.margin(quantizer.codes), np.asarray(quantizer.quantised), scores)
    of_fit = CodebookScores(quantizer.codebooks, quantizer.quantised)
    codes = np.empty((len(space.values), quantizer.codebooks.num_levels), dtype=np.int64)
    margin = np.empty(len(codes), dtype=np.float32)
    with MatrixWriter(latents, quantizer.codebooks.dim) as writer:
        blocks = list(row_blocks(len(codes), _BLOCK_ROWS))
        for block in track(blocks, "assigning codes", total=len(codes), size=lambda block: block.stop - block.start):
            x = quantizer.project(torch.from_numpy(np.array(space.values[block])))
            if quantizer.encoder is not None:
                writer.append(x.numpy())
            found = quantizer.encode(x)
            codes[block], margin[block] = found.numpy(), of_fit.margin_of(x, found, torch.float32)
        quantised = space.values if quantizer.encoder is None else writer.finish()
    return RawCodes(codes, margin, quantised, CodebookScores(quantizer.codebooks, quantised, of_fit.temperature))


def resolve_codes(config: QuantizeConfig, sizes: Sizes, space: VectorSpace, raw: RawCodes) -> Resolution:
    """Collision handling by `config.collisions`; equal vectors share a SID."""
    scores = raw.scores
    functions = (scores.last_scores, scores.prefix_candidates, scores.prefix_beams)
    return resolve(config.collisions, raw.codes, space.contents, (sizes.codebook_size,) * sizes.num_levels, *functions)


def sid_table(
    config: QuantizeConfig, sizes: Sizes, files: VectorFiles, space: VectorSpace, raw: RawCodes, resolution: Resolution
) -> SidTable:
    """The SID table, rows in the order of the source."""
    return SidTable(
        files.ids.take(space.rows).to_pylist(),
        resolution.codes,
        raw.codes,
        resolution.suffix,
        raw.margin,
        (sizes.codebook_size,) * sizes.num_levels,
        tokenizer_sha256=f"quantize:{config.method}",
        source=None if space.with_behaviour is None else np.where(space.with_behaviour, BEHAVIOUR, CONTENT).astype(object),
        integer_ids=files.integer_ids,
    )


def measure(
    config: QuantizeConfig, table: SidTable, space: VectorSpace, quantizer: Quantizer, raw: RawCodes, resolution: Resolution
) -> dict[str, Any]:
    """Intrinsic metrics; reconstruction and nearest neighbours on at most 50,000 items (`measured_items`)."""
    metrics = intrinsic_metrics(table, content_hashes=space.contents, seed=config.seed)
    rows = space.sample(_MEASURED_ITEMS, config.seed)
    quantised, vectors = np.asarray(raw.quantised[rows]), quantizer.codebooks.vectors.numpy()
    if len(rows) > 1:
        metrics["neighbour_lcp"] = nearest_neighbour_lcp(table.codes[rows], np.asarray(space.values[rows]), seed=config.seed)
    metrics["fidelity"] = fidelity(quantised, vectors, table.codes[rows])
    metrics["fidelity_raw"] = fidelity(quantised, vectors, table.raw_codes[rows])
    metrics["measured_items"] = len(rows)
    metrics["collisions"] = {"policy": config.collisions, "moved": resolution.moved, "spilled": resolution.spilled}
    return metrics
