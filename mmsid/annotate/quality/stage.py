"""Stage `text_quality` (started by `scripts/train_reward.py --part text`): a model that scores descriptors without asking a judge.

Examples come from a finished `judge` folder, or, on the drawn catalogue, from its known truth. A text model is trained on preference
pairs of the `fit` items, its scores become probabilities on the `calibrate` items, and its figures come from the `held_out` items. Then
every mined descriptor gets a q in [0, 1], and every item the confidence-weighted mean of its own.

Writes descriptors.parquet (item_id, place, descriptor, confidence, score, q), items.parquet (item_id, q; null without interests),
model/, report.json (accuracy per kind, calibration, thresholds), log.jsonl. Without interests q is 1 for every item.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmsid.accelerator import make_accelerator
from mmsid.annotate.quality.calibration import accuracy_per_kind, fit_platt, item_quality, pair_accuracy, probability, reliability
from mmsid.annotate.quality.demo_examples import demo_examples, read_demo_facts
from mmsid.annotate.quality.examples import PARTS, Example, Pair, Part, judged_examples, part_of, preference_pairs
from mmsid.annotate.quality.model import TextModelConfig, build_text_model, encode, load_text_model, score_ids, train_text_model
from mmsid.annotate.readers import read_captions, read_interests, read_judgements
from mmsid.artifacts import Draft, read_json, read_manifest, write_json, write_table, writing
from mmsid.backbone.text import no_loading_bar
from mmsid.catalog import Catalog, CatalogConfig, Item, read_catalog
from mmsid.config import StageConfig
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import done


class TextQualityConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        interests: a finished `interests` folder. None, or one mined from co-engagement: q is 1 for every item.
        captions: a finished `caption` folder; pictures count as evidence only through it.
        judgements: a finished `judge` folder over these interests; or
        truth: truth.parquet of a drawn catalogue. Where both are given, the truth is used.
        calibrate, held_out: shares of the items, by content hash, that the pairs of the fit leave alone.
        repeats: how often wrong descriptors are drawn per right one of an item (with `truth`).
        least_accuracy: share of held-out pairs that must be ordered rightly.
        most_calibration_error: of q against the labels of the held-out items.
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


def run(config: TextQualityConfig) -> Path:
    """Train, measure and score into `config.out`; returns the folder.

    Raises:
        ConfigError: interests without judgements or truth, or too few labelled examples of either label.
        MmsidError: the held-out figures miss a threshold; they stay in the draft's report.json.
        ArtifactError, CatalogError: an input cannot be read.
    """
    accelerator = make_accelerator()
    behavioural = config.interests is not None and read_manifest(config.interests, "interests")["extra"].get("source") == "coengagement"
    learns = config.interests is not None and not behavioural
    if learns and config.judgements is None and config.truth is None:
        raise ConfigError("text_quality: interests are given, but nothing that says which are good; name judgements (of `judge`) or truth")
    inputs = {"items": config.catalog.items} | {name: getattr(config, name) for name in ("interests", "captions", "judgements", "truth")}
    with writing(config.out, stage="text_quality", config=config, inputs=inputs) as draft:
        accelerator.wait_for_everyone()
        catalog = read_catalog(config.catalog)
        if learns:
            _Job(config, catalog, draft, accelerator.is_main_process).run()
        elif accelerator.is_main_process:
            why = "interests were mined from co-engagement" if behavioural else "no interests were given"
            _write_scores(draft, catalog, [], 1.0)
            draft.extra["text_quality"] = f"1 for every item: {why}"
        accelerator.wait_for_everyone()
    done(f"text_quality: wrote {config.out} ({draft.extra.get('text_quality', '')})")
    return config.out


class _Job:
    def __init__(self, config: TextQualityConfig, catalog: Catalog, draft: Draft, is_main: bool) -> None:
        self.config, self.catalog, self.draft, self.is_main = config, catalog, draft, is_main
        captions = read_captions(config.captions) if config.captions is not None else {}
        self.evidence = [evidence_text(item, captions.get(item.item_id, "")) for item in catalog.items]
        self.interests = read_interests(config.interests)

    def run(self) -> None:
        """Examples, pairs, training, figures, scores; rank 0 measures and writes."""
        config, folder = self.config, self.draft.path
        examples = self._examples()
        rng = np.random.default_rng([config.seed, 1])
        pairs = {part: preference_pairs(examples[part], rng) for part in PARTS}
        self._check(examples, pairs)
        self.model, self.text_tokenizer = build_text_model(config.model, config.seed)
        asked = [(self._ids(pair.chosen), self._ids(pair.rejected)) for pair in pairs["fit"]]
        self.model = train_text_model(
            self.model, self.text_tokenizer, asked, config.model, scratch=folder / "trainer", log=folder / "log.jsonl", seed=config.seed
        )
        if not self.is_main:
            return
        report, platt = self._measure(examples, pairs)
        write_json(folder / "report.json", report)
        self._hold(report)
        with no_loading_bar():
            self.model.save_pretrained(folder / "model")
        self.text_tokenizer.save_pretrained(folder / "model")
        _write_scores(self.draft, self.catalog, self._score_mined(platt), None)
        self.draft.extra |= {"labels": "truth" if config.truth is not None else "judge", **report}
        self.draft.extra["text_quality"] = (
            f"{report['accuracy']:.3f} of held-out pairs right, calibration error {report['calibration_error']:.3f}"
        )

    def _examples(self) -> dict[Part, list[Example]]:
        """Labelled examples of every part of the catalogue."""
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

    def _check(self, examples: dict[Part, list[Example]], pairs: dict[Part, list[Pair]]) -> None:
        for part in PARTS:
            good = sum(example.label for example in examples[part])
            bad = len(examples[part]) - good
            if not pairs[part] or not good or not bad:
                raise ConfigError(
                    f"text_quality: the {part} items hold {good} good and {bad} bad descriptors; both are needed to learn a difference. "
                    "Judge more items, or leave the stage out: the text quality is then 1 for every item"
                )

    def _ids(self, example: Example) -> list[int]:
        return encode(self.text_tokenizer, example.descriptor, self.evidence[example.row], self.config.model.max_length)

    def _measure(self, examples: dict[Part, list[Example]], pairs: dict[Part, list[Pair]]) -> tuple[dict[str, Any], tuple[float, float]]:
        """The report on held-out items, and what turns a score into q, fitted on the calibration items."""
        known = {part: score_ids(self.model, [self._ids(example) for example in examples[part]]) for part in ("calibrate", "held_out")}
        labels = {part: np.array([example.label for example in examples[part]]) for part in known}
        platt = fit_platt(known["calibrate"], labels["calibrate"])
        tested = pairs["held_out"]
        gaps = score_ids(self.model, [self._ids(pair.chosen) for pair in tested])
        gaps -= score_ids(self.model, [self._ids(pair.rejected) for pair in tested])
        report = {
            "pairs": {part: len(pairs[part]) for part in PARTS},
            "accuracy": pair_accuracy(gaps),
            "accuracy_per_kind": accuracy_per_kind(gaps, tested),
            **reliability(probability(known["held_out"], platt), labels["held_out"]),
            "platt": {"a": platt[0], "b": platt[1]},
            "least_accuracy": self.config.least_accuracy,
            "most_calibration_error": self.config.most_calibration_error,
        }
        return report, platt

    def _hold(self, report: dict[str, Any]) -> None:
        """Raise where a threshold is missed: a quality that is noise must not steer anything."""
        problems = []
        if report["accuracy"] < report["least_accuracy"]:
            kinds = ", ".join(f"{kind} {row['accuracy']:.3f}" for kind, row in report["accuracy_per_kind"].items())
            problems.append(
                f"orders {report['accuracy']:.3f} of the held-out pairs rightly ({kinds}), least_accuracy is {report['least_accuracy']}"
            )
        if report["calibration_error"] > report["most_calibration_error"]:
            problems.append(f"has a calibration error of {report['calibration_error']:.3f}, allowed is {report['most_calibration_error']}")
        if problems:
            where = self.draft.path / "report.json"
            raise MmsidError(
                f"text_quality: the text model {' and '.join(problems)}; nothing was published, its figures are in {where}. "
                "Label more descriptors, train longer (model.steps), or name a larger model (model.path)"
            )

    def _score_mined(self, platt: tuple[float, float]) -> list[dict[str, Any]]:
        """One row per mined descriptor, in the catalogue's order and the miner's."""
        rows, questions = [], []
        for row, item in enumerate(self.catalog.items):
            found = self.interests.get(item.item_id)
            for place, one in enumerate(found.descriptors if found else ()):
                rows.append({"item_id": item.item_id, "place": place, "descriptor": one.descriptor, "confidence": one.confidence})
                questions.append(self._ids(Example(row, one.descriptor, 1, "mined")))
        scores = score_ids(self.model, questions)
        for row, score, q in zip(rows, scores.tolist(), probability(scores, platt).tolist(), strict=True):
            row |= {"score": score, "q": q}
        return rows


def score_descriptors(folder: Path, descriptors: Sequence[str], evidence: Sequence[str]) -> np.ndarray:
    """q in [0, 1] of new descriptors (Q,) by a finished folder's model, without the catalogue it was trained on.

    Args:
        evidence: one text per descriptor, as `evidence_text` writes it.

    Raises:
        ArtifactError: the folder is unfinished, or holds no model because there were no interests.
    """
    manifest = read_manifest(folder, "text_quality")
    platt = read_json(Path(folder) / "report.json")["platt"]
    model, text_tokenizer = load_text_model(Path(folder) / "model")
    longest = manifest["config"]["model"]["max_length"]
    ids = [encode(text_tokenizer, one, about, longest) for one, about in zip(descriptors, evidence, strict=True)]
    return probability(score_ids(model, ids), (platt["a"], platt["b"]))


def evidence_text(item: Item, caption: str) -> str:
    """What is known of an item, as the model reads it; the description stands last, because truncation cuts there."""
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


def _write_scores(draft: Draft, catalog: Catalog, rows: list[dict[str, Any]], everywhere: float | None) -> None:
    """Both tables and the counts; `everywhere` is the q of items without descriptors (null where the others tell)."""
    own: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        own.setdefault(row["item_id"], []).append(row)
    qualities = []
    for item in catalog.items:
        found = own.get(item.item_id)
        q = everywhere
        if found:
            q = item_quality(np.array([row["confidence"] for row in found]), np.array([row["q"] for row in found]))
        qualities.append({"item_id": item.item_id, "q": q})
    write_table(draft.path / "descriptors.parquet", pa.Table.from_pylist(rows, pa.schema(list(_DESCRIPTOR_TYPES.items()))))
    write_table(draft.path / "items.parquet", pa.Table.from_pylist(qualities, pa.schema({"item_id": pa.string(), "q": pa.float64()})))
    draft.counts |= {"items": len(catalog.items), "descriptors": len(rows), "items_without_interests": len(catalog.items) - len(own)}
    known = [row["q"] for row in qualities if row["q"] is not None]
    draft.extra["mean_q"] = float(np.mean(known)) if known else None
