"""HTML report: one self-contained file with style, script, data and pictures, which opens without server or network.

Texts of a catalogue are untrusted. The template escapes them, data for the script is JSON that cannot end its element, the script inserts
text nodes only, and a content security policy forbids every other script and all external resources.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsid.artifacts import is_complete, read_json, write_text
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.errors import ArtifactError
from mmsid.report.catalogue import catalogue_section
from mmsid.report.charts import SINGLE_SEED_NOTE, difference_charts, gate_marks, metric_charts, metric_names, seed_count
from mmsid.report.explore import embedded_json, explore
from mmsid.report.render import page_style, policy_hash, template
from mmsid.report.run_folder import manifests, sid_folders
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.intrinsic_table import intrinsic_columns

HERE = Path(__file__).parent
SCRIPTS = ("page.js", "explore.js", "codes.js")


def write_run_page(run: Path, config: CatalogConfig, out: Path) -> Path:
    """Write the page of a run folder to `out`.

    Raises:
        ArtifactError: `run` has no finished stage, or a stage is damaged.
        CatalogError: the catalogue cannot be read.
    """
    stages = manifests(run)
    folders = sid_folders(run)
    metrics = read_json(run / "train_recommender" / "metrics.json") if is_complete(run / "train_recommender") else None
    catalog = read_catalog(config) if folders or is_complete(run / "ingest") else None
    page = {
        "title": run.resolve().name,
        "catalogue": None if catalog is None else catalogue_section(run, catalog, config),
        "explored": explore(run, catalog, config, folders) if folders else None,
        "intrinsic": intrinsic_columns({name: read_json(folder / INTRINSIC) for name, folder in folders.items()}),
        "refinement": _refinement(run),
        "stages": [
            {"stage": name, "seconds": manifest["wall_seconds"], "counts": manifest["counts"], "version": manifest["package_version"]}
            for name, manifest in stages.items()
        ],
    }
    write_text(out, _render(page | _results(metrics)))
    return out


def write_results_page(results: Path, out: Path) -> Path:
    """Write the page of benchmark results (a JSON file with a list `arms`) to `out`. It has charts and tables only.

    Raises:
        ArtifactError: the file cannot be read or has no results.
    """
    found = read_json(results)
    rows = found.get("arms") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"arm", "family", "metrics"} <= set(row) for row in rows):
        raise ArtifactError(f"{results} holds no list `arms` of entries with arm, family and metrics; give a file that `mmsid bench` wrote")
    dataset = found.get("dataset")
    title = dataset["name"] if isinstance(dataset, dict) and "name" in dataset else dataset if isinstance(dataset, str) else results.stem
    empty = {"title": title, "catalogue": None, "explored": None, "intrinsic": {}, "refinement": None, "stages": []}
    write_text(out, _render(empty | _results(found)))
    return out


def _results(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Charts and tables of the methods: test figures, or valid figures when test was not evaluated."""
    found = found or {"arms": []}
    part = "test" if any(row["metrics"] for row in found["arms"] if row["family"] != "best_achievable") else "valid"
    rows = [row | {"metrics": row["metrics"] if part == "test" else row.get("valid", {})} for row in found["arms"]]
    dataset = found.get("dataset")
    return {
        "part": part,
        "rows": rows,
        "metrics": metric_names(rows),
        "charts": metric_charts(rows),
        "differences": difference_charts(found.get("differences", []), part),
        "seeds": seed_count(rows),
        "single_seed_note": SINGLE_SEED_NOTE,
        "not_run": dataset.get("not_run", []) if isinstance(dataset, dict) else [],
    }


def _refinement(run: Path) -> dict[str, Any] | None:
    if not is_complete(run / "refine"):
        return None
    gate = read_json(run / "refine" / "gate.json")
    return {"accepted": gate["accepted"], "reasons": gate["reasons"], "marks": gate_marks(gate["rows"]), "gain_share": gate["gain_share"]}


def _render(page: Mapping[str, Any]) -> str:
    explored = dict(page["explored"] or {})
    pictures = explored.pop("thumbnails", {})
    style = page_style()
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return template("mmsid.report", "page.html.j2").render(
        **page,
        style=style,
        script=script,
        style_hash=policy_hash(style),
        script_hash=policy_hash(script),
        data=embedded_json(explored or None),
        pictures=embedded_json(pictures),
    )
