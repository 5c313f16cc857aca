"""Files of a recommender folder: what `Recommender` needs, written as JSON, parquet and safetensors, and read back.

The folder has a manifest and checksums. Search indexes, tries and posting lists are not stored; they are built at loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from mmsid._version import __version__
from mmsid.artifacts import (
    read_json,
    read_manifest,
    read_table,
    read_weights,
    verify_file,
    verify_folder,
    write_json,
    write_table,
    write_tensors,
    write_text,
    writing,
)
from mmsid.errors import ArtifactError
from mmsid.recommend.coengagement_source import CoEngagementSource
from mmsid.recommend.embedding_source import EmbeddingSource
from mmsid.recommend.path_source import PathSource
from mmsid.recommend.paths import ItemPaths
from mmsid.recommend.ranker import Ranker
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape
from mmsid.recommend.sources import Sources, term_sources
from mmsid.recommend.words import Vectorizers, labels_vectorizer, words_vectorizer
from mmsid.sids.table import FILE_NAME, SidTable

FORMAT = 1
CONFIG, CARD, ITEMS = "recommender.json", "README.md", "items.parquet"
EMBEDDINGS = "embeddings.safetensors"


@dataclass
class RecommenderState:
    """Everything that a recommender consists of, over N items.

    Attributes:
        table: item ids and published codes of all N items.
        content_hashes: N strings.
        added: (N,) int64, 0 for items that the recommender was trained with, k for those of the k-th addition.
        withdrawn: (N,) bool, items that left the catalogue and are not recommended.
    """

    table: SidTable
    content_hashes: list[str]
    added: np.ndarray
    withdrawn: np.ndarray
    sources: Sources
    rankers: Sequence[Ranker]
    vectorizers: Vectorizers


def save_state(folder: Path, state: RecommenderState, card: str, identity: Mapping[str, str]) -> None:
    """Write a recommender folder.

    Args:
        card: Markdown of README.md.
        identity: hashes that identify the recommender.

    Raises:
        ArtifactError: the folder is finished already or holds foreign files.
    """
    sources = state.sources
    with writing(Path(folder), stage="recommender", config=dict(identity)) as draft:
        path = draft.path
        state.table.save(path / FILE_NAME)
        columns = {"item_id": state.table.item_ids, "content_sha256": state.content_hashes}
        write_table(path / ITEMS, pa.table(columns | {"interactions": sources.counts, "added": state.added, "withdrawn": state.withdrawn}))
        for name, vectorizer in state.vectorizers._asdict().items():
            if vectorizer is not None:
                terms = {"term": vectorizer.get_feature_names_out().tolist(), "idf": np.asarray(vectorizer.idf_, dtype=np.float64)}
                write_table(path / f"{name}.parquet", pa.table(terms))
        write_tensors(path / "evidence.safetensors", _from_sparse(sources.coengagement.matrices))
        write_tensors(path / "content.safetensors", _from_sparse({"words": sources.words.vectors, "labels": sources.labels.vectors}))
        if sources.embedding is not None:
            tensors = {"embeddings": torch.from_numpy(sources.embedding.embeddings)}
            if sources.embedding.centroids is not None:
                tensors["centroids"] = torch.from_numpy(np.ascontiguousarray(sources.embedding.centroids))
            write_tensors(path / EMBEDDINGS, tensors)
        write_tensors(path / "decoder.safetensors", dict(sources.path.model.state_dict()))
        rankers = {f"{place}.{name}": value for place, ranker in enumerate(state.rankers) for name, value in ranker.state_dict().items()}
        write_tensors(path / "ranker.safetensors", rankers)
        settings = {
            "format": FORMAT,
            "package_version": __version__,
            "shape": asdict(sources.path.model.shape),
            "sizes": list(sources.path.paths.sizes),
            "rankers": len(state.rankers),
            "features": sources.feature_names(),
        }
        write_json(path / CONFIG, settings | dict(identity))
        write_text(path / CARD, card)
        draft.counts["items"] = len(state.table)


def load_state(folder: Path) -> tuple[RecommenderState, dict[str, Any]]:
    """Read a recommender folder. -> its state, and the keys of recommender.json.

    Raises:
        ArtifactError: not a recommender folder, another format, or damaged files.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        hint = f"; it is in {folder / 'recommender'}" if (folder / "recommender" / CONFIG).is_file() else ""
        raise ArtifactError(
            f"{folder} is not a recommender folder: it has no {CONFIG}{hint}; give the one that `mmsid train_recommender` wrote"
        )
    read_manifest(folder, "recommender")
    verify_folder(folder)
    settings = read_json(folder / CONFIG)
    if settings.get("format") != FORMAT:
        raise ArtifactError(f"{folder}: recommender format {settings.get('format')!r}, this version reads {FORMAT}; train it again")
    table, items = SidTable.load(folder), read_table(folder / ITEMS)
    content = _to_sparse(read_weights(folder / "content.safetensors"))
    embeddings = read_weights(folder / EMBEDDINGS) if (folder / EMBEDDINGS).is_file() else None
    added = items["added"].to_numpy()
    sources = Sources(
        path=_path_source(folder, table, settings, known=added == 0),
        coengagement=CoEngagementSource(_to_sparse(read_weights(folder / "evidence.safetensors"))),
        embedding=None if embeddings is None else _embedding_source(embeddings),
        counts=items["interactions"].to_numpy(),
        **term_sources(*(content[name][added == 0] for name in ("words", "labels"))),
    )
    if (added > 0).any():
        sources.words.add(content["words"][added > 0])
        sources.labels.add(content["labels"][added > 0])
    if settings["features"] != sources.feature_names():
        raise ArtifactError(
            f"{folder}: the ranker reads the features {settings['features']}, this version computes {sources.feature_names()}; "
            "load it with the version that wrote it, or train it again"
        )
    vectorizers = Vectorizers(
        _vectorizer(folder / "words.parquet", words_vectorizer), _vectorizer(folder / "labels.parquet", labels_vectorizer)
    )
    rankers = _rankers(folder, settings["rankers"], len(settings["features"]))
    withdrawn = items["withdrawn"].to_numpy()
    return RecommenderState(table, items["content_sha256"].to_pylist(), added, withdrawn, sources, rankers, vectorizers), settings


def embeddings_file(sids: Path) -> Path | None:
    """File of the item embeddings next to a SID table, None where there is none. `sids`: a SID folder or its sids.parquet."""
    folder = Path(sids).parent if Path(sids).name == FILE_NAME else Path(sids)
    return folder / EMBEDDINGS if (folder / EMBEDDINGS).is_file() else None


def read_embeddings(sids: Path, item_ids: Sequence[str]) -> np.ndarray | None:
    """Embeddings (n, D) of items from the SID folder `sids`, None where it has none.

    Raises:
        ArtifactError: an item has no Semantic ID, or the file has another number of rows than the table.
    """
    path = embeddings_file(sids)
    if path is None:
        return None
    verify_file(path)
    table, vectors = SidTable.load(sids), read_weights(path)["embeddings"].numpy()
    if len(vectors) != len(table):
        raise ArtifactError(f"{path} has {len(vectors)} rows, {FILE_NAME} beside it {len(table)}; run the stage that wrote them again")
    row_of = table.row_of
    missing = [item_id for item_id in item_ids if item_id not in row_of]
    if missing:
        raise ArtifactError(f"{sids}: {len(missing)} items have no Semantic ID (first: {missing[0]!r}); assign SIDs for them first")
    return vectors[[row_of[item_id] for item_id in item_ids]]


def path_tokens(table: SidTable, sizes: Sequence[int]) -> np.ndarray:
    """Paths (N, D) of a table for a decoder with these codes per level.

    Raises:
        ArtifactError: the table has codes that the decoder does not have.
    """
    tokens = table.codes
    if len(sizes) == table.num_levels + 1:
        suffix = np.full(len(table), -1) if table.suffix is None else table.suffix
        tokens = np.column_stack([tokens, suffix + 1])
    elif table.suffix is not None and (table.suffix >= 0).any():
        raise ArtifactError("the Semantic IDs have a collision suffix, those of the recommender have none; train it again")
    if tokens.shape[1] != len(sizes) or (len(tokens) and (tokens.max(0) >= np.array(sizes)).any()):
        most = tokens.max(0).tolist() if len(tokens) else []
        raise ArtifactError(f"the largest codes per level are {most}, the recommender was trained with {list(sizes)} codes; train it again")
    return tokens


def _path_source(folder: Path, table: SidTable, settings: Mapping[str, Any], known: np.ndarray) -> PathSource:
    tokens = path_tokens(table, settings["sizes"])
    paths = ItemPaths(tokens, tuple(settings["sizes"]))
    model = SidTransformer(paths, SidTransformerShape(**settings["shape"]))
    _load_weights(model, read_weights(folder / "decoder.safetensors"), folder)
    return PathSource(model, paths, known)


def _embedding_source(tensors: Mapping[str, torch.Tensor]) -> EmbeddingSource:
    embeddings = tensors["embeddings"].numpy()
    return EmbeddingSource(embeddings, tensors["centroids"].numpy() if "centroids" in tensors else None)


def _rankers(folder: Path, count: int, features: int) -> list[Ranker]:
    weights, rankers = read_weights(folder / "ranker.safetensors"), []
    for place in range(count):
        ranker = Ranker(torch.zeros(features), torch.ones(features))
        prefix = f"{place}."
        _load_weights(ranker, {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, folder)
        rankers.append(ranker.eval())
    return rankers


def _load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: weights do not fit the settings ({error}); copy the folder again or train it again") from error


def _vectorizer(path: Path, build: Callable[..., TfidfVectorizer]) -> TfidfVectorizer | None:
    if not path.is_file():
        return None
    terms = read_table(path)
    vectorizer = build(vocabulary={term: place for place, term in enumerate(terms["term"].to_pylist())})
    vectorizer.idf_ = terms["idf"].to_numpy().astype(np.float32)
    return vectorizer


def _from_sparse(matrices: Mapping[str, sparse.csr_matrix]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, matrix in matrices.items():
        parts = {"data": matrix.data, "indices": matrix.indices.astype(np.int32), "indptr": matrix.indptr.astype(np.int64)}
        parts["shape"] = np.array(matrix.shape, dtype=np.int64)
        tensors |= {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(values)) for part, values in parts.items()}
    return tensors


def _to_sparse(tensors: Mapping[str, torch.Tensor]) -> dict[str, sparse.csr_matrix]:
    matrices = {}
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        data, indices, indptr, shape = (tensors[f"{name}.{part}"].numpy() for part in ("data", "indices", "indptr", "shape"))
        matrices[name] = sparse.csr_matrix((data, indices, indptr), shape=tuple(shape.tolist()))
    return matrices
