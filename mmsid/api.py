"""The stages of the pipeline as Python functions.

Every function takes the keys of its section in a run's YAML as keyword arguments, writes one artefact folder, and returns its path.
A finished and unchanged folder is kept; captioning, interests and tokenizer training resume after an interruption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel

from mmsid.catalog.catalog import catalog_settings
from mmsid.config import build
from mmsid.errors import ConfigError
from mmsid.ray_pool import Engine
from mmsid.stages import run_stage, run_unless_finished

if TYPE_CHECKING:
    import numpy as np

PathLike: TypeAlias = str | Path
CatalogSettings: TypeAlias = Mapping[str, Any] | BaseModel | PathLike


def _run(stage: str, out: PathLike, catalog: CatalogSettings | None, settings: Mapping[str, Any], engine: Engine = "local") -> Path:
    given = {"out": out, **settings}
    if catalog is not None:
        given["catalog"] = catalog_settings(catalog) if isinstance(catalog, (str, Path)) else catalog
    return run_stage(stage, given, engine)


def ingest(out: PathLike, catalog: CatalogSettings, *, engine: Engine = "local", **settings: Any) -> Path:
    """Read a catalogue once: items, pictures and user histories. `catalog=out` then opens it in every other stage.

    Args:
        out: folder to write. A folder whose sources have changed is written again.
        catalog: keys of the `catalog:` section, or the path of its items table.
        engine: "local", or "ray" to look at the pictures on a Ray cluster.
        settings: keys of `IngestConfig`.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders; too many unusable rows or pictures.
    """
    return _run("ingest", out, catalog, settings, engine)


def train_captioner(out: PathLike, catalog: CatalogSettings | None = None, **settings: Any) -> Path:
    """Train a small vision-language model, or LoRA adapters on a hub model, to caption the pictures of a catalogue.

    Args:
        out: model folder to write. `AutoProcessor` and `AutoModelForImageTextToText` load it.
        catalog: keys of the `catalog:` section, or the path of its items table. None: drawn demo ads (`source="drawn"`).
        settings: keys of `TrainCaptionerConfig`.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders.
    """
    return _run("train_captioner", out, catalog, settings)


def caption(out: PathLike, catalog: CatalogSettings, *, engine: Engine = "local", **settings: Any) -> Path:
    """Caption every picture of a catalogue with a vision-language model (CMSA, arXiv 2604.20861).

    Args:
        out: folder to write: `shards/part-*.parquet` with one row per picture, `in = ok + quarantined`.
        catalog: keys of the `catalog:` section, the path of its items table, or a folder of `ingest`.
        engine: "local", or "ray" for a Ray cluster.
        settings: keys of `CaptionConfig`, for example `model="Qwen/Qwen2.5-VL-3B-Instruct"`.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders.
        AnnotationError: too many rows failed.
    """
    return _run("caption", out, catalog, settings, engine)


def interests(out: PathLike, catalog: CatalogSettings, *, engine: Engine = "local", **settings: Any) -> Path:
    """Mine the interests behind every item (DCIM, arXiv 2604.20861): descriptors with confidences and a summary.

    Args:
        out: folder to write: one row per item.
        catalog: keys of the `catalog:` section, the path of its items table, or a folder of `ingest`.
        engine: "local", or "ray" for a Ray cluster.
        settings: keys of `InterestsConfig`: `model`, or `generator="coengagement"`, and `captions`, a finished caption folder.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders.
        AnnotationError: too many rows failed.
    """
    return _run("interests", out, catalog, settings, engine)


def judge(out: PathLike, catalog: CatalogSettings, **settings: Any) -> Path:
    """Label every mined descriptor 0 or 1 with a language model. Keys: `JudgeConfig`. Raises as `caption`."""
    return _run("judge", out, catalog, settings)


def train_text_quality(out: PathLike, catalog: CatalogSettings, **settings: Any) -> Path:
    """Train the reward model of mined interests from judged descriptors. Keys: `TextQualityConfig`."""
    return _run("text_quality", out, catalog, settings)


def train_tokenizer(out: PathLike, catalog: CatalogSettings, **settings: Any) -> Path:
    """Train an item tokenizer: one backbone that gives Semantic IDs and an embedding (UniSID, arXiv 2602.10445).

    Args:
        out: tokenizer folder to write; `ItemTokenizer.from_pretrained(out)` loads it.
        catalog: keys of the `catalog:` section, or the path of its items table.
        settings: keys of `TrainTokenizerConfig`: `captions` and `interests` (finished folders), `num_levels`, `codebook_size`, `steps`.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders.
        MmsidError: a gradient is NaN or infinite.
    """
    return _run("train_tokenizer", out, catalog, settings)


def assign(out: PathLike, catalog: CatalogSettings, tokenizer: PathLike, *, engine: Engine = "local", **settings: Any) -> Path:
    """Assign a Semantic ID to every item of a catalogue.

    Args:
        out: SID folder to write: `sids.parquet`, embeddings, trie, intrinsic metrics, exports. `SidTable.load(out)` reads it.
        catalog: keys of the `catalog:` section, or the path of its items table.
        tokenizer: tokenizer folder.
        engine: "local", or "ray" for a Ray cluster.
        settings: keys of `AssignConfig`. `append=FOLDER` keeps the published codes of an earlier SID folder.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders.
        MmsidError: the catalogue holds more distinct items than there are Semantic IDs.
    """
    return _run("assign", out, catalog, {"tokenizer": tokenizer, **settings}, engine)


def quantize_vectors(
    vectors: PathLike | Sequence[PathLike] | np.ndarray, out: PathLike, *, ids: Sequence[str] | PathLike | None = None, **settings: Any
) -> Path:
    """Make Semantic IDs of ready-made vectors, without a catalogue or a tokenizer (`mmsid quantize`).

    Args:
        vectors: parquet files, `.npy` matrices, folders of parquet files or of `datasets.save_to_disk`; or an array (N, D).
        out: SID folder to write: `sids.parquet`, embeddings, trie, codebooks, intrinsic metrics, exports, `report.md`.
        ids: N ids, or a file of them; default: the column `item_id` of the files, or row numbers for matrices.
        settings: keys of `QuantizeConfig`: `method`, `codebook_size`, `num_levels`, `behaviour`, `seed`.

    Raises:
        CatalogError: vectors or ids cannot be read, or more than half of the vectors are unusable.
        ConfigError: invalid settings, or fewer Semantic IDs than items.
        ArtifactError: the folder was finished with other settings or other vectors.
    """
    from mmsid.catalog.vector_files import vectors_in_memory
    from mmsid.tokenizer.quantize_vectors import QuantizeConfig, run

    given, files = {"out": out, **settings}, None
    if hasattr(vectors, "shape"):
        if isinstance(ids, (str, Path)):
            raise ConfigError(f"quantize_vectors: ids is the file {ids}, but vectors are an array; pass the ids as a sequence")
        files = vectors_in_memory(vectors, ids)
        given["array_sha256"] = files.sha256()
    else:
        if ids is not None and not isinstance(ids, (str, Path)):
            raise ConfigError("quantize_vectors: ids are a sequence, but vectors are files; pass the path of a file of ids")
        given |= {"vectors": vectors, "ids": ids}
    config = build(QuantizeConfig, given, source="mmsid.quantize_vectors", section="quantize")
    run_unless_finished("quantize", config, lambda config: run(config, files))
    return config.out


def stability(out: PathLike, catalog: CatalogSettings, tokenizer: PathLike, **settings: Any) -> Path:
    """Measure code stability: flip rates under shortened captions, JPEG compression and crops. Keys: `StabilityConfig`."""
    return _run("stability", out, catalog, {"tokenizer": tokenizer, **settings})


def baselines(out: PathLike, catalog: CatalogSettings, **settings: Any) -> Path:
    """Make Semantic IDs with baseline methods (random, RQ-KMeans, RQ-VAE, balanced RQ). Keys: `BaselinesConfig`."""
    return _run("baselines", out, catalog, settings)


def train_sid_reward(out: PathLike, catalog: CatalogSettings, tokenizer: PathLike, sids: PathLike, **settings: Any) -> Path:
    """Train the reward model of Semantic IDs and report its held-out accuracy. Keys: `SidRewardConfig`."""
    return _run("sid_reward", out, catalog, {"tokenizer": tokenizer, "sids": sids, **settings})


def refine_tokenizer(out: PathLike, catalog: CatalogSettings, tokenizer: PathLike, sids: PathLike, **settings: Any) -> Path:
    """Refine the SID head by policy optimisation under a learned reward (QARM, arXiv 2604.20861), behind an acceptance gate.

    Args:
        out: folder to write: `tokenizer/` and `sids/` (refined, or unchanged if the gate refuses), `gate.json`, `log.jsonl`.
        catalog: keys of the `catalog:` section with `sequences` or `events`, or the path of its items table.
        tokenizer: the start: a tokenizer folder.
        sids: SID folder that this tokenizer assigned.
        settings: keys of `RefineConfig`.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders.
    """
    return _run("refine", out, catalog, {"tokenizer": tokenizer, "sids": sids, **settings})


def train_recommender(out: PathLike, catalog: CatalogSettings, variants: Mapping[str, PathLike], **settings: Any) -> Path:
    """Train a recommender on every SID folder of `variants` and rank the full catalogue beside classical baselines.

    Args:
        out: folder to write: `ranking.md`, `metrics.json`, the ranks of every user.
        catalog: keys of the `catalog:` section with `sequences` or `events`.
        variants: name -> SID folder.
        settings: keys of `TrainRecommenderConfig`: `seeds`, `architecture`, `baseline`.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders.
    """
    return _run("train_recommender", out, catalog, {"variants": dict(variants), **settings})


def train_recommender_rl(out: PathLike, catalog: CatalogSettings, sids: PathLike, **settings: Any) -> Path:
    """Train a causal recommender on one SID folder, then reinforce it with GRPO. Keys: `TrainRecommenderRLConfig`."""
    return _run("train_recommender_rl", out, catalog, {"sids": sids, **settings})


def write_recommendations(
    out: PathLike, catalog: CatalogSettings, recommender: PathLike, sids: PathLike, *, engine: Engine = "local", **settings: Any
) -> Path:
    """Write the best k items of every user as parquet shards (stage `recommend`).

    Args:
        out: folder to write: `recommendations/part-*.parquet`, and `problems.parquet` with the rows of unusable users.
        catalog: keys of the `catalog:` section. Its users are recommended to, unless `users` names another table.
        recommender: recommender folder. `Recommender.from_pretrained(recommender)` answers single requests.
        sids: SID folder in use now. New items in it are added to the recommender.
        engine: "local", or "ray" for a Ray cluster.
        settings: keys of `RecommendConfig`: `users`, `k`, `only`.

    Raises:
        ConfigError, CatalogError, ArtifactError: invalid settings, catalogue or folders.
    """
    return _run("recommend", out, catalog, {"recommender": recommender, "sids": sids, **settings}, engine)


def write_report(out: PathLike, catalog: CatalogSettings, run: PathLike, **settings: Any) -> Path:
    """Write `report.html` and `summary.md` of a run folder. Keys: `ReportConfig`."""
    return _run("report", out, catalog, {"run": run, **settings})


def bundle(
    out: PathLike,
    tokenizer: PathLike | None = None,
    sids: PathLike | None = None,
    *,
    run: PathLike | None = None,
    recommender: PathLike | None = None,
    captions: PathLike | None = None,
    interests: PathLike | None = None,
) -> Path:
    """Copy everything that turns a new ad into codes and recommendations into one folder: tokenizer, Semantic IDs, embeddings, the
    recommender, the settings of captions and interests, and titles and thumbnails of the items. `load_bundle(out)` reads it.

    Args:
        run: folder of a run; its recommender decides which Semantic IDs are taken. Give it, or `tokenizer` and `sids`.
        tokenizer: tokenizer folder of `sids`.
        sids: SID folder.
        recommender: folder of the recommender; by default that of the run that `sids` is in, if it fits.
        captions: caption folder whose model and prompt are taken; by default that of the run.
        interests: interests folder whose model and prompt are taken; by default that of the run.

    Raises:
        ArtifactError: another tokenizer assigned the Semantic IDs, the recommender does not fit them, or a file is missing.
        ConfigError: neither `run` nor both of `tokenizer` and `sids` are given.
    """
    from mmsid.serve.bundling import bundle_run

    given = {"tokenizer": tokenizer, "sids": sids, "run": run, "recommender": recommender, "captions": captions, "interests": interests}
    return bundle_run(Path(out), **{name: None if path is None else Path(path) for name, path in given.items()})


def inspect_sids(path: PathLike, *, catalog: CatalogSettings | None = None, **settings: Any) -> dict[str, Any]:
    """Audit a mapping of items to Semantic IDs: a SID folder of mmsid, or a file of another project.

    Args:
        path: SID folder, `sids.parquet`, index.json, a table with ids and codes, or a matrix of codes (`.npy`).
        catalog: keys of the `catalog:` section, the path of its items table, or a folder of `ingest`: histories and categories.
        settings: arguments of `mmsid.inspection.audit.inspect_sids`: `histories`, `vectors`, `against` (an older mapping), `page` (an HTML
            file to write), `id_column`, `code_columns`, `codebook_sizes`.

    Returns:
        The figures, ready for JSON.
    Raises:
        ArtifactError, CatalogError: a file cannot be read, or does not belong to the others.
    """
    from mmsid.inspection.audit import inspect_sids as run

    return run(path, catalog=_catalog_config(catalog), **settings)


def export_sids(sids: PathLike, out: PathLike, format: str, *, catalog: CatalogSettings | None = None, **settings: Any) -> Path:
    """Write Semantic IDs in the format of one consumer.

    Args:
        sids: SID folder, or its sids.parquet.
        out: folder to write.
        format: "flashrec", "nvidia", "minionerec" (needs `catalog`) or "huggingface" (needs `model` or `tokenizer`).
        settings: `model`, `tokenizer` (folders or hub names), `name` (of the data set for minionerec).

    Raises:
        ConfigError, CatalogError, ArtifactError: an argument does not belong to the format, or a folder cannot be read.
    """
    from mmsid.export.export import export_sids as run

    return run(sids, out, format, catalog=_catalog_config(catalog), **settings)  # type: ignore[arg-type]


def _catalog_config(catalog: CatalogSettings | None) -> Any:
    from mmsid.catalog import CatalogConfig

    if catalog is None or isinstance(catalog, CatalogConfig):
        return catalog
    given = catalog_settings(catalog) if isinstance(catalog, (str, Path)) else catalog
    return build(CatalogConfig, dict(given), source="mmsid", section="catalog")
