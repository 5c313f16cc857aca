"""Command `mmsid export`: Semantic IDs in the format of one consumer, as one folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from mmsid.artifacts import Draft, read_tensors, writing
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.errors import ArtifactError, ConfigError
from mmsid.export import flashrec, item_constraints, minionerec
from mmsid.export.text_model import write_text_model, write_text_tokenizer
from mmsid.export.text_tokens import SidTokens, add_sid_tokens, load_text_tokenizer
from mmsid.progress import done
from mmsid.sids.code_vectors import CodeVectors, code_vectors
from mmsid.sids.table import FILE_NAME, SidTable

Format = Literal["flashrec", "nvidia", "minionerec", "huggingface"]
FORMATS: tuple[str, ...] = get_args(Format)
EMBEDDINGS = "embeddings.safetensors"


def export_sids(
    sids: str | Path,
    out: str | Path,
    format: Format,
    *,
    model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    catalog: CatalogConfig | None = None,
    name: str | None = None,
) -> Path:
    """Write Semantic IDs for a consumer.

    Args:
        sids: SID folder, or its sids.parquet. Code vectors come from `embeddings.safetensors` beside it.
        out: folder to write.
        format: `flashrec`: vocabulary file. `nvidia`: item constraints. `minionerec`: data set. `huggingface`: text tokenizer, or model.
        model: language model whose embeddings are resized; written to `out` with its tokenizer. Not for `minionerec`.
        tokenizer: text tokenizer that gets the SID tokens; default: that of `model`. Without either, `nvidia` numbers the codes
            consecutively from 0, and `flashrec` writes the vocabulary alone.
        catalog: texts and histories for `minionerec`.
        name: of the data set for `minionerec`; default: the name of `out`.

    Returns:
        `out`.
    Raises:
        ConfigError: an argument is missing or does not belong to the format.
        ArtifactError: the Semantic IDs, the model or the tokenizer cannot be read, or do not fit the format.
    """
    _check_arguments(format, model, tokenizer, catalog)
    table, source, out = SidTable.load(sids), Path(sids), Path(out)
    settings = {"format": format, "model": model, "tokenizer": tokenizer, "name": name}
    with writing(out, stage="export", config={key: str(value) for key, value in settings.items() if value is not None}) as draft:
        draft.counts["items"] = len(table)
        if format == "minionerec":
            assert catalog is not None
            found = read_catalog(catalog)
            parts = minionerec.write_minionerec(draft.path, name or out.name, table, found, split_histories(found, catalog.split))
            draft.counts.update(parts)
            line = ", ".join(f"{count:,} {part}" for part, count in parts.items()) + " interactions"
        else:
            vectors = _vectors(source, table) if (model or tokenizer) else None
            line = _WRITERS[format](draft, table, model, tokenizer, vectors)
    done(f"export: wrote {len(table):,} Semantic IDs for {format} to {out} ({line.replace('OUT', str(out))})")
    return out


def _check_arguments(format: str, model: Any, tokenizer: Any, catalog: Any) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; known: {', '.join(FORMATS)}")
    if format == "minionerec":
        if catalog is None:
            raise ConfigError("minionerec needs the catalogue's texts and histories; name a configuration with --config")
        if model is not None or tokenizer is not None:
            raise ConfigError("minionerec adds SID tokens to its model itself; leave --model and --tokenizer out")
    elif catalog is not None:
        raise ConfigError(f"{format} reads no catalogue; leave --config out")
    if format == "huggingface" and model is None and tokenizer is None:
        raise ConfigError("huggingface extends a text tokenizer or a model; name one with --tokenizer or --model")


def _flashrec(draft: Draft, table: SidTable, model: Any, tokenizer: Any, vectors: list[CodeVectors] | None) -> str:
    tokens = flashrec.flashrec_tokens(table)
    draft.counts["paths"] = flashrec.write_vocabulary(draft.path / flashrec.FILE, table, tokens)
    if model is None and tokenizer is None:
        return f"{draft.counts['paths']:,} paths"
    text_tokenizer = load_text_tokenizer(tokenizer or model)
    add_sid_tokens(text_tokenizer, tokens)
    begin, end = text_tokenizer.convert_tokens_to_ids(list(flashrec.BOUNDARY))
    layout = flashrec.serving_layout(tokens.ids_in(text_tokenizer), (begin, end))
    draft.extra["sid"] = layout
    _write_text(draft, text_tokenizer, tokens, model, vectors)
    return f"serve it with: flashrec --model-path OUT --sid-vocab-file OUT/{flashrec.FILE} --sid {layout}"


def _nvidia(draft: Draft, table: SidTable, model: Any, tokenizer: Any, vectors: list[CodeVectors] | None) -> str:
    tokens, text_tokenizer = SidTokens.of(table), None
    ids = tokens.consecutive_ids()
    if model is not None or tokenizer is not None:
        text_tokenizer = load_text_tokenizer(tokenizer or model)
        add_sid_tokens(text_tokenizer, tokens)
        ids = tokens.ids_in(text_tokenizer)
        _write_text(draft, text_tokenizer, tokens, model, vectors)
    lines = item_constraints.write_item_constraints(draft.path / item_constraints.FILE, table, tokens, ids)
    draft.counts["paths"] = lines
    size = 1 + max(int(one.max()) for one in ids)
    shared = f"; {len(table) - lines:,} items share the line of another" if lines < len(table) else ""
    return f"{lines:,} paths of token ids below {size:,}{shared}"


def _huggingface(draft: Draft, table: SidTable, model: Any, tokenizer: Any, vectors: list[CodeVectors] | None) -> str:
    tokens = SidTokens.of(table)
    text_tokenizer = load_text_tokenizer(tokenizer or model)
    added = add_sid_tokens(text_tokenizer, tokens)
    rows = _write_text(draft, text_tokenizer, tokens, model, vectors)
    draft.counts.update({"tokens_added": added, "rows_initialised": rows})
    return f"{added:,} tokens added" + (f", {rows:,} embedding rows set from code vectors" if model is not None else "")


def _write_text(draft: Draft, text_tokenizer: Any, tokens: SidTokens, model: Any, vectors: list[CodeVectors] | None) -> int:
    """Write the model with its tokenizer, or the tokenizer alone. Returns the number of rows set from code vectors."""
    if model is not None:
        return write_text_model(draft.path, model, text_tokenizer, tokens, vectors)
    write_text_tokenizer(draft.path, text_tokenizer, tokens, vectors)
    return 0


def _vectors(source: Path, table: SidTable) -> list[CodeVectors] | None:
    """Code vectors of a SID folder, or None with a warning where it has no embeddings."""
    path = (source.parent if source.name == FILE_NAME else source) / EMBEDDINGS
    if not path.is_file():
        warnings.warn(f"{path} does not exist, so the rows of the SID tokens start from the model's mean embedding", stacklevel=3)
        return None
    embeddings = read_tensors(path)["embeddings"].float().numpy()
    if len(embeddings) != len(table):
        raise ArtifactError(f"{path} has {len(embeddings)} rows, the Semantic IDs {len(table)}; assign them again")
    return code_vectors(table.codes, table.codebook_sizes, embeddings)


_WRITERS: dict[str, Callable[..., str]] = {"flashrec": _flashrec, "nvidia": _nvidia, "huggingface": _huggingface}
