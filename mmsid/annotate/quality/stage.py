"""Stage `text_quality` (`scripts/train_reward.py --part text`): trains a model that scores mined descriptors.

Labelled examples come from a `judge` folder, or from the known facts of the demo catalogue. The model is trained on preference pairs of
the `fit` items, calibrated on the `calibrate` items and evaluated on the `held_out` items. Every mined descriptor gets a q in [0, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmsid.accelerator import make_accelerator
from mmsid.annotate.quality.calibration import accuracy_per_kind, fit_platt, item_quality, pair_accuracy, probability, reliability
from mmsid.annotate.quality.demo_examples import demo_examples, read_demo_facts
from mmsid.annotate.quality.examples import PARTS, Example, Pair, Part, judged_examples, part_of, preference_pairs
from mmsid.annotate.quality.model import TextModelConfig, build_text_model, encode, score_ids, train_text_model
from mmsid.annotate.readers import captions_of, interests_of, read_judgements
from mmsid.artifacts import Draft, read_manifest, write_json, write_table, writing
from mmsid.backbone.loading_bar import no_loading_bar
from mmsid.catalog import Catalog, CatalogConfig, Item, read_catalog
from mmsid.config import StageConfig
from mmsid.errors import ConfigError, MmsidError
from mmsid.id_columns import with_id_column
from mmsid.progress import done


class TextQualityConfig(StageConfig):
    """Configuration of `text_quality`.

    Attributes:
        catalog: the items.
        interests: a finished `interests` folder. None, or interests mined from co-engagement: q is 1 for every item.
        captions: a finished `caption` folder. Its captions are part of the evidence; pictures are not.
        judgements: a finished `judge` folder of these interests.
        truth: truth.parquet of a demo catalogue. It takes precedence over `judgements`.
        model: the model that scores a descriptor, and its training.
        calibrate: share of the items that calibrate the scores.
        held_out: share of the items that are evaluated.
        repeats: bad examples of each kind per good one of a `fit` item (with `truth`).
        least_accuracy: smallest accepted share of held-out pairs in the right order.
        most_calibration_error: largest accepted calibration error of q on the held-out items.
    """

    catalog: CatalogConfig
    interests: Path | None = None
    captions: Path | None = None
    judgements: Path | None = None
    truth: Path | None = None
    model: TextModelConfig = TextModelConfig()
    calibrate: float = Field(default=0.1, gt=0, lt=0.5)
    held_out: float = Field(default=0.2, gt=0, lt=0.5)
    repeats: int = Field(default=4, gt=0)
    least_accuracy: float = Field(default=0.8, ge=0, le=1)
    most_calibration_error: float = Field(default=0.1, ge=0, le=1)

    def inputs(self) -> dict[str, Path | None]:
        """The catalogue without users, and the folders and files of labels."""
        given = {name: getattr(self, name) for name in ("interests", "captions", "judgements", "truth")}
        return self.catalog.without_users().inputs() | given


def run(config: TextQualityConfig) -> Path:
    """Train, evaluate and score. Returns `config.out`.

    Writes descriptors.parquet (item_id, place, descriptor, confidence, score, q), items.parquet (item_id, q; the mean over descriptors
    weighted by confidence, null for items without interests), model/, report.json (accuracy per kind, calibration, thresholds) and
    log.jsonl. Without mined interests q is 1 for every item and no model is trained.

    Raises:
        ConfigError: interests without judgements or truth, or a part of the items without good or without bad examples.
        MmsidError: the held-out metrics miss a threshold. They remain in report.json of the draft folder.
        ArtifactError, CatalogError: an input cannot be read.
    """
    accelerator = make_accelerator()
    from_coengagement = (
        config.interests is not None and read_manifest(config.interests, "interests")["extra"].get("source") == "coengagement"
    )
    learns = config.interests is not None and not from_coengagement
    if learns and config.judgements is None and config.truth is None:
        raise ConfigError("text_quality: interests are given without labels; set text_quality.judgements (a `judge` folder) or .truth")
    with writing(config.out, stage="text_quality", config=config, inputs=config.inputs()) as draft:
        accelerator.wait_for_everyone()
        catalog = read_catalog(config.catalog)
        if learns:
            _Job(config, catalog, draft, accelerator.is_main_process).run()
        elif accelerator.is_main_process:
            reason = "interests were mined from co-engagement" if from_coengagement else "no interests were given"
            _write_scores(draft, catalog, [], 1.0)
            draft.extra["text_quality"] = f"1 for every item: {reason}"
        accelerator.wait_for_everyone()
    done(f"text_quality: wrote {config.out} ({draft.extra.get('text_quality', '')})")
    return config.out


class _Job:
    """One run with interests: its inputs, its model and its outputs."""

    def __init__(self, config: TextQualityConfig, catalog: Catalog, draft: Draft, is_main: bool) -> None:
        self.config, self.catalog, self.draft, self.is_main = config, catalog, draft, is_main
        captions = captions_of(catalog, config.captions)
        self.evidence = [evidence_text(item, captions.get(item.item_id, "")) for item in catalog.items]
        self.interests = interests_of(catalog, config.interests)

    def run(self) -> None:
        """Train on all ranks; evaluate, score and write on rank 0."""
        config, folder = self.config, self.draft.path
        examples = self._examples()
        rng = np.random.default_rng([config.seed, 1])
        pairs = {part: preference_pairs(examples[part], rng) for part in PARTS}
        self._check_labels(examples, pairs)
        self.model, self.text_tokenizer = build_text_model(config.model, config.seed)
        inputs = [(self._ids(pair.chosen), self._ids(pair.rejected)) for pair in pairs["fit"]]
        self.model = train_text_model(
            self.model, self.text_tokenizer, inputs, config.model, scratch=folder / "trainer", log=folder / "log.jsonl", seed=config.seed
        )
        if not self.is_main:
            return
        report, platt = self._measure(examples, pairs)
        write_json(folder / "report.json", report)
        self._check_thresholds(report)
        with no_loading_bar():
            self.model.save_pretrained(folder / "model")
        self.text_tokenizer.save_pretrained(folder / "model")
        _write_scores(self.draft, self.catalog, self._score_mined(platt), None)
        self.draft.extra |= {"labels": "truth" if config.truth is not None else "judge", **report}
        self.draft.extra["text_quality"] = (
            f"{report['accuracy']:.3f} of held-out pairs right, calibration error {report['calibration_error']:.3f}"
        )

    def _examples(self) -> dict[Part, list[Example]]:
        """Labelled examples of each part of the catalogue."""
        config, items = self.config, self.catalog.items
        rows: dict[Part, list[int]] = {part: [] for part in PARTS}
        for row, item in enumerate(items):
            rows[part_of(item, config.seed, (config.calibrate, config.held_out))].append(row)
        if config.truth is not None:
            facts, rng = read_demo_facts(config.truth, items), np.random.default_rng([config.seed, 0])
            return {
                part: [
                    example
                    for _ in range(config.repeats if part == "fit" else 1)
                    for example in demo_examples(facts, rows[part], rng, held_out=part == "held_out")
                ]
                for part in PARTS
            }
        judged = judged_examples(items, self.interests, read_judgements(config.judgements))
        part_of_row = {row: part for part in PARTS for row in rows[part]}
        return {part: [example for example in judged if part_of_row[example.row] == part] for part in PARTS}

    def _check_labels(self, examples: dict[Part, list[Example]], pairs: dict[Part, list[Pair]]) -> None:
        for part in PARTS:
            good = sum(example.label for example in examples[part])
            bad = len(examples[part]) - good
            if not pairs[part] or not good or not bad:
                raise ConfigError(
                    f"text_quality: the {part} items have {good} good and {bad} bad descriptors, and both are needed; judge more items, or "
                    "leave the stage out, which makes the text quality 1 for every item"
                )

    def _ids(self, example: Example) -> list[int]:
        return encode(self.text_tokenizer, example.descriptor, self.evidence[example.row], self.config.model.max_length)

    def _measure(self, examples: dict[Part, list[Example]], pairs: dict[Part, list[Pair]]) -> tuple[dict[str, Any], tuple[float, float]]:
        """The report on the held-out items, and the Platt coefficients of the calibration items."""
        scores = {part: score_ids(self.model, [self._ids(example) for example in examples[part]]) for part in ("calibrate", "held_out")}
        labels = {part: np.array([example.label for example in examples[part]]) for part in scores}
        platt = fit_platt(scores["calibrate"], labels["calibrate"])
        tested = pairs["held_out"]
        gaps = score_ids(self.model, [self._ids(pair.chosen) for pair in tested])
        gaps -= score_ids(self.model, [self._ids(pair.rejected) for pair in tested])
        report = {
            "pairs": {part: len(pairs[part]) for part in PARTS},
            "accuracy": pair_accuracy(gaps),
            "accuracy_per_kind": accuracy_per_kind(gaps, tested),
            **reliability(probability(scores["held_out"], platt), labels["held_out"]),
            "platt": {"a": platt[0], "b": platt[1]},
            "least_accuracy": self.config.least_accuracy,
            "most_calibration_error": self.config.most_calibration_error,
        }
        return report, platt

    def _check_thresholds(self, report: dict[str, Any]) -> None:
        """Raise MmsidError if a threshold is missed, so that later stages do not use a quality that is noise."""
        problems = []
        if report["accuracy"] < report["least_accuracy"]:
            kinds = ", ".join(f"{kind} {row['accuracy']:.3f}" for kind, row in report["accuracy_per_kind"].items())
            problems.append(
                f"orders {report['accuracy']:.3f} of the held-out pairs correctly ({kinds}), least_accuracy is {report['least_accuracy']}"
            )
        if report["calibration_error"] > report["most_calibration_error"]:
            problems.append(
                f"has a calibration error of {report['calibration_error']:.3f}, "
                f"most_calibration_error is {report['most_calibration_error']}"
            )
        if problems:
            raise MmsidError(
                f"text_quality: the text model {' and '.join(problems)}; nothing was published, its metrics are in "
                f"{self.draft.path / 'report.json'}. Label more descriptors, train longer (model.steps), or use a larger model (model.path)"
            )

    def _score_mined(self, platt: tuple[float, float]) -> list[dict[str, Any]]:
        """One row per mined descriptor, in the order of the catalogue and of the miner."""
        rows, inputs = [], []
        for row, item in enumerate(self.catalog.items):
            found = self.interests.get(item.item_id)
            for place, mined in enumerate(found.descriptors if found else ()):
                rows.append({"item_id": item.item_id, "place": place, "descriptor": mined.descriptor, "confidence": mined.confidence})
                inputs.append(self._ids(Example(row, mined.descriptor, 1, "mined")))
        scores = score_ids(self.model, inputs)
        for row, score, q in zip(rows, scores.tolist(), probability(scores, platt).tolist(), strict=True):
            row |= {"score": score, "q": q}
        return rows


def evidence_text(item: Item, caption: str) -> str:
    """Texts of an item as input of the model. The description is last, because inputs are truncated at the end."""
    fields = {"title": item.title, "caption": caption, "description": item.description}
    return " ".join(f"{name}: {text.strip().rstrip('.')}." for name, text in fields.items() if text.strip())


_DESCRIPTOR_TYPES = {
    "item_id": pa.string(),
    "place": pa.int64(),
    "descriptor": pa.string(),
    "confidence": pa.float64(),
    "score": pa.float64(),
    "q": pa.float64(),
}
_QUALITY_TYPES = {"item_id": pa.string(), "q": pa.float64()}


def _write_scores(draft: Draft, catalog: Catalog, rows: list[dict[str, Any]], default_q: float | None) -> None:
    """Write both tables and the counts. `default_q` is the q of items without descriptors."""
    rows_of_item: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rows_of_item.setdefault(row["item_id"], []).append(row)
    qualities = []
    for item in catalog.items:
        found = rows_of_item.get(item.item_id)
        q = default_q
        if found:
            q = item_quality(np.array([row["confidence"] for row in found]), np.array([row["q"] for row in found]))
        qualities.append({"item_id": item.item_id, "q": q})
    for name, found, types in (("descriptors", rows, _DESCRIPTOR_TYPES), ("items", qualities, _QUALITY_TYPES)):
        table = pa.Table.from_pylist(found, pa.schema(types))
        write_table(draft.path / f"{name}.parquet", with_id_column(table, catalog.integer_ids))
    draft.counts |= {
        "items": len(catalog.items),
        "descriptors": len(rows),
        "items_without_interests": len(catalog.items) - len(rows_of_item),
    }
    known = [row["q"] for row in qualities if row["q"] is not None]
    draft.extra["mean_q"] = float(np.mean(known)) if known else None
