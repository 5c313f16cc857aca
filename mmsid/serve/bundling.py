"""Bundles of a run: tokenizer, SIDs and embeddings, and the parts that turn a new ad (picture, title) into codes and recommendations.

recommender/       the recommender that the run kept, with the items of the SID folder
annotation.json    settings, prompts and models of captions and interests; models of the run are copied to `models/`
items.parquet      title, caption, interests, content hash and thumbnail of every item, in the order of the SID table
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa

from mmsid.artifacts import is_complete, manifest_folder, read_manifest, sha256, write_json, write_table
from mmsid.catalog import Catalog, CatalogConfig, read_catalog
from mmsid.catalog.annotations import SENSITIVE
from mmsid.errors import ArtifactError, ConfigError
from mmsid.progress import done, track
from mmsid.recommend.recommender import Recommender
from mmsid.recommend.recommender_files import CONFIG as RECOMMENDER_FILE
from mmsid.report.explore import spread
from mmsid.report.run_folder import catalog_of_run
from mmsid.report.thumbnails import item_thumbnail
from mmsid.serve.annotation_settings import FILE_NAME as ANNOTATION
from mmsid.serve.annotation_settings import annotation_settings
from mmsid.sids.table import FILE_NAME, SidTable
from mmsid.tokenizer.bundle import BundlePart, write_bundle
from mmsid.tokenizer.inputs import read_caption_texts, read_mined_interests

ITEMS, RECOMMENDER = "items.parquet", "recommender"
MAX_THUMBNAILS = 20_000  # about 60 MB; a larger catalogue shows titles for the rest
ITEM_SCHEMA = pa.schema(
    {
        "item_id": pa.string(),
        "title": pa.string(),
        "caption": pa.string(),
        "interests": pa.list_(pa.string()),
        "content_sha256": pa.string(),
        "thumbnail": pa.binary(),
    }
)


def bundle_run(
    out: Path,
    *,
    tokenizer: Path | None = None,
    sids: Path | None = None,
    run: Path | None = None,
    recommender: Path | None = None,
    captions: Path | None = None,
    interests: Path | None = None,
) -> Path:
    """Write the bundle `out` from a tokenizer and its SIDs, or from a run. Arguments as `mmsid.bundle`.

    What the run does not have is left out, and a line says so.
    """
    if run is not None and tokenizer is None and sids is None:
        tokenizer, sids = _of_run(run)
    elif run is not None or tokenizer is None or sids is None:
        raise ConfigError("bundle: give the folder of a run (--run), or a tokenizer and its Semantic IDs (--tokenizer and --sids)")
    run = run or manifest_folder(sids).parent
    table, notes = SidTable.load(sids), []
    found = {name: run / name if is_complete(run / name) else None for name in ("caption", "interests")}
    folders = {"caption": captions or found["caption"], "interests": interests or found["interests"]}
    config, catalog = _catalog(run, notes)
    parts = [_recommender(run, recommender, sids, catalog, notes)]
    parts.append(_annotation(folders, config, notes))
    parts.append(None if catalog is None else _items(catalog, config, table, folders))
    write_bundle(tokenizer, sids, out, [part for part in parts if part is not None])
    for note in notes:
        done(f"bundle: {note}")
    return out


def _of_run(run: Path) -> tuple[Path, Path]:
    """Tokenizer and SID folder of a run: those of its recommender, else the latest."""
    pairs = {run / "refine" / "sids": run / "refine" / "tokenizer", run / "assign": run / "train_tokenizer"}
    pairs = {sids: tokenizer for sids, tokenizer in pairs.items() if (sids / FILE_NAME).is_file() and is_complete(manifest_folder(sids))}
    if not pairs:
        raise ArtifactError(f"{run} has no finished stage assign or refine; give the folder of a run, e.g. runs/demo")
    folder = run / "train_recommender" / RECOMMENDER
    if (folder / RECOMMENDER_FILE).is_file():
        kept = Recommender.from_pretrained(folder)
        for sids, tokenizer in pairs.items():
            table = SidTable.load(sids)
            if table.tokenizer_sha256 == kept.tokenizer_sha256 and table.align(kept.item_ids).codes.tolist() == kept.sids.codes.tolist():
                return tokenizer, sids
    return next((tokenizer, sids) for sids, tokenizer in pairs.items())


def _catalog(run: Path, notes: list[str]) -> tuple[CatalogConfig | None, Catalog | None]:
    try:
        config = catalog_of_run(run)
        return config, read_catalog(config)
    except ArtifactError as error:
        notes.append(f"no titles and pictures of the items, because the catalogue was not found ({error})")
        return None, None


def _recommender(run: Path, given: Path | None, sids: Path, catalog: Catalog | None, notes: list[str]) -> BundlePart | None:
    folder = given or run / "train_recommender" / RECOMMENDER
    if given is None and not (folder / RECOMMENDER_FILE).is_file():
        notes.append(f"no recommender, because {run} has none; `mmsid train_recommender` keeps one")
        return None
    try:
        recommender = Recommender.from_pretrained(folder, sids=sids)
    except ArtifactError as error:
        if given is not None:
            raise
        notes.append(f"no recommender, because that of the run does not fit these Semantic IDs ({error}); --run chooses fitting ones")
        return None
    known = set(recommender.item_ids)
    missing = [item_id for item_id in SidTable.load(sids).item_ids if item_id not in known]
    if missing and catalog is None:
        raise ArtifactError(f"{sids} has {len(missing):,} items that the recommender lacks, and their catalogue was not found in {run}")

    def write(out: Path) -> None:
        if not missing:
            shutil.copytree(folder, out / RECOMMENDER)
            return
        recommender.grow(catalog.items, sids)
        recommender.save_pretrained(out / RECOMMENDER)
        (out / f".{RECOMMENDER}.lock").unlink(missing_ok=True)

    identity = sha256([recommender.sids_sha256, read_manifest(folder).get("identity_sha256"), missing])
    return BundlePart(RECOMMENDER, identity, write, f"`{RECOMMENDER}/`: `mmsid.Recommender.from_pretrained` loads it")


def _annotation(folders: dict[str, Path | None], config: CatalogConfig | None, notes: list[str]) -> BundlePart | None:
    settings, models = {}, {}
    for stage, folder in folders.items():
        if folder is None:
            notes.append(f"no settings of the stage {stage}, because the run has not finished it")
            continue
        settings[stage], model = annotation_settings(folder, stage)
        models |= {} if model is None else model
    if not settings:
        return None
    settings["clean_text"] = bool(config and config.clean_text)

    def write(out: Path) -> None:
        write_json(out / ANNOTATION, settings)
        for name, source in models.items():
            shutil.copytree(source, out / name, ignore=shutil.ignore_patterns(".*"))

    return BundlePart("annotation", sha256(settings), write, f"`{ANNOTATION}`: models and prompts of captions and interests")


def _items(catalog: Catalog, config: CatalogConfig, table: SidTable, folders: dict[str, Path | None]) -> BundlePart:
    captions, interests = read_caption_texts(folders["caption"]), read_mined_interests(folders["interests"])
    row_of = {item_id: row for row, item_id in enumerate(catalog.item_ids)}

    def write(out: Path) -> None:
        order = [row for row in spread(table.codes).tolist() if table.item_ids[row] in row_of][:MAX_THUMBNAILS]
        pictures = {
            row: item_thumbnail(catalog.items[row_of[table.item_ids[row]]], config)
            for row in track(order, what="bundle: thumbnails", unit="pictures")
        }
        rows = []
        for row, item_id in enumerate(table.item_ids):
            item = catalog.items[row_of[item_id]] if item_id in row_of else None
            mined = interests.get(item_id)
            rows.append(
                {
                    "item_id": item_id,
                    "title": item.title if item else "",
                    "caption": captions.get(item_id, ""),
                    "interests": [*mined.descriptors] if mined and mined.source == "llm" else [],
                    "content_sha256": item.content_sha256 if item else "",
                    "thumbnail": pictures.get(row),
                }
            )
        write_table(out / ITEMS, pa.Table.from_pylist(rows, schema=ITEM_SCHEMA))

    identity = sha256([catalog.sha256, sha256(captions), sha256({name: mined.descriptors for name, mined in interests.items()})])
    described = f"`{ITEMS}`: titles, captions and thumbnails of the items; texts flagged `{SENSITIVE}` are left out"
    return BundlePart("items", identity, write, described)
