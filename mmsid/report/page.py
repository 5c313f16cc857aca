"""The page: one HTML file with its style, script, data and pictures inside, opened from disk without server or network.

Text from a catalogue is a stranger's: the template escapes all of it, data for the script is JSON that cannot leave its element, the script
writes text and never markup, and a content security policy lets nothing run or load but what this file was written with.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmsid.artifacts import is_complete, read_json, write_text
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.errors import ArtifactError
from mmsid.report.charts import difference_charts, gate_marks, metric_charts, metric_names
from mmsid.report.explore import MOST_ITEMS, embedded_json, explore
from mmsid.report.run_folder import manifests, sid_folders
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.intrinsic_table import intrinsic_columns

HERE = Path(__file__).parent
SCRIPTS = ("page.js", "explore.js", "codes.js")


def write_run_page(run: Path, config: CatalogConfig, out: Path, most_items: int = MOST_ITEMS) -> Path:
    """Write the page of a run folder to `out`.

    Raises:
        ArtifactError: `run` holds no finished stage, or one is damaged.
        CatalogError: the catalogue cannot be read.
    """
    stages = manifests(run)
    arms = sid_folders(run)
    metrics = read_json(run / "train_recommender" / "metrics.json") if is_complete(run / "train_recommender") else None
    explored = explore(run, read_catalog(config), config, arms, most_items) if arms else None
    page = {
        "title": run.resolve().name,
        "explored": explored,
        "intrinsic": intrinsic_columns({arm: read_json(folder / INTRINSIC) for arm, folder in arms.items()}),
        "refinement": _refinement(run),
        "stages": [
            {"stage": name, "seconds": manifest["wall_seconds"], "counts": manifest["counts"], "version": manifest["package_version"]}
            for name, manifest in stages.items()
        ],
    }
    write_text(out, _render(page | _results(metrics)))
    return out


def write_results_page(results: Path, out: Path) -> Path:
    """Write the page of a benchmark's results (JSON with `arms`) to `out`: chart and tables only.

    Raises:
        ArtifactError: the file cannot be read or holds no results.
    """
    found = read_json(results)
    arms = found.get("arms") if isinstance(found, dict) else None
    if not isinstance(arms, list) or not all(isinstance(arm, dict) and {"arm", "family", "metrics"} <= set(arm) for arm in arms):
        raise ArtifactError(f"{results} holds no list `arms` of entries with arm, family and metrics; name a file that `mmsid bench` wrote")
    dataset = found.get("dataset")
    title = dataset["name"] if isinstance(dataset, dict) and "name" in dataset else dataset if isinstance(dataset, str) else results.stem
    empty = {"title": title, "explored": None, "intrinsic": {}, "refinement": None, "stages": []}
    write_text(out, _render(empty | _results(found)))
    return out


def _results(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Charts and tables of the arms: test figures, or valid ones where test was not ranked."""
    found = found or {"arms": []}
    part = "test" if any(arm["metrics"] for arm in found["arms"] if arm["family"] != "best_achievable") else "valid"
    arms = [arm | {"metrics": arm["metrics"] if part == "test" else arm.get("valid", {})} for arm in found["arms"]]
    dataset = found.get("dataset")
    return {
        "part": part,
        "arms": arms,
        "metrics": metric_names(arms),
        "charts": metric_charts(arms),
        "differences": difference_charts(found.get("differences", []), part),
        "most_seeds": max((len(arm.get("seeds", [])) for arm in arms), default=0),
        "not_run": dataset.get("not_run", []) if isinstance(dataset, dict) else [],
    }


def _refinement(run: Path) -> dict[str, Any] | None:
    if not is_complete(run / "refine"):
        return None
    gate = read_json(run / "refine" / "gate.json")
    return {"accepted": gate["accepted"], "reasons": gate["reasons"], "marks": gate_marks(gate["rows"]), "gain_share": gate["gain_share"]}


def _render(page: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("mmsid.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    explored = dict(page["explored"] or {})
    pictures = explored.pop("thumbnails", {})
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("page.html.j2").render(
        **page,
        style=style,
        script=script,
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
        data=embedded_json(explored or None),
        pictures=embedded_json(pictures),
    )


def _policy_hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")
