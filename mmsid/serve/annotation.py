"""Captions and interests of new ads, by the models and prompts that a bundle names, in this process.

A model on a server is not called: a bundle may come from elsewhere, and must not send pictures to an address that it names.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmsid.annotate.annotator import Annotator
from mmsid.annotate.caption import CaptionConfig, build_generator, confidence_of, masked, record_of
from mmsid.annotate.generator import Generator
from mmsid.annotate.interests import InterestsConfig
from mmsid.annotate.job_inputs import JobInput, Task
from mmsid.annotate.prompts import Prompt, evidence_json, item_evidence
from mmsid.annotate.records import Interests, parse_interests
from mmsid.catalog import CatalogConfig
from mmsid.catalog.annotations import SENSITIVE
from mmsid.config import build
from mmsid.errors import ConfigError
from mmsid.serve.ads import Ad
from mmsid.serve.annotation_settings import FILE_NAME, read_settings

KEPT_ANSWERS = 4096  # of the latest different ads, so that the same ad is not generated twice


@dataclass(frozen=True)
class AdTexts:
    """Caption and interests of one ad.

    Attributes:
        caption: '' if there is none.
        interests: (descriptor, confidence), the best supported first; the confidence of interests that came with the ad is 1.
        summary: '' if there is none.
        notes: why a text is missing.
    """

    caption: str = ""
    interests: tuple[tuple[str, float], ...] = ()
    summary: str = ""
    notes: tuple[str, ...] = ()


class AdAnnotator:
    """Writes captions and interests for batches of ads. One thread at a time may use it.

    Args:
        folder: of the bundle.

    Attributes:
        notes: why captions or interests are not written; empty if both are.
    """

    def __init__(self, folder: Path) -> None:
        settings = read_settings(folder)
        self.notes: list[str] = []
        self._stages = {stage: self._load(Path(folder), stage, settings.get(stage)) for stage in ("caption", "interests")}

    def _load(self, folder: Path, stage: str, settings: Mapping[str, Any] | None) -> _Stage | None:
        what = "captions" if stage == "caption" else stage
        if settings is None:
            self.notes.append(f"no {what}: the bundle has no settings of the stage {stage}")
        elif settings["generator"] == "captions":
            return None  # the answers of the caption stage hold them
        elif settings["source"] != "llm":
            self.notes.append(f"no {what}: those of the catalogue were mined from logs, which a new ad does not have")
        elif settings["generator"] != "huggingface":
            self.notes.append(f"no {what}: those of the catalogue were written by {settings['model']!r} on a server; give them with the ad")
        else:
            try:
                return _Stage(folder, stage, settings)
            except ConfigError as error:
                self.notes.append(f"no {what}: {error}")
        return None

    def annotate(self, ads: Sequence[Ad]) -> list[AdTexts]:
        """Texts of each ad. Texts that come with an ad are kept, and no model is asked for them."""
        captions, mined = [ad.caption for ad in ads], [tuple((name, 1.0) for name in ad.interests) for ad in ads]
        summaries, notes = [""] * len(ads), [[] for _ in ads]
        for row, result in self._ask("caption", ads, [at for at, text in enumerate(captions) if not text], captions, notes):
            captions[row] = result["caption"]
            if "descriptors" in result and not mined[row]:  # one answer held both (`caption.with_interests`)
                mined[row], summaries[row] = _interests(result)
        for row, result in self._ask("interests", ads, [at for at, found in enumerate(mined) if not found], captions, notes):
            mined[row], summaries[row] = _interests(result)
        return [AdTexts(*parts) for parts in zip(captions, mined, summaries, map(tuple, notes), strict=True)]

    def _ask(
        self, stage: str, ads: Sequence[Ad], rows: Sequence[int], captions: Sequence[str], notes: list[list[str]]
    ) -> Iterable[tuple[int, dict[str, Any]]]:
        """(row, usable record) of the ads that the model was asked for; `notes` get the reasons of the others."""
        model = self._stages[stage]
        if model is None or not rows:
            return
        try:
            results = model.rows([ads[row] for row in rows], [captions[row] for row in rows])
        except ConfigError as error:  # the weights are read with the first request
            self._stages[stage] = None
            self.notes.append(f"no {'captions' if stage == 'caption' else stage}: {error}")
            return
        for row, result in zip(rows, results, strict=True):
            if result["status"] != "ok":
                notes[row].append(f"no {stage}: {result['reason']}")
            elif SENSITIVE in result["flags"]:
                notes[row].append(f"no {stage}: the text is about a sensitive trait, so it is not used")
            else:
                yield row, result


def _interests(row: Mapping[str, Any]) -> tuple[tuple[tuple[str, float], ...], str]:
    """Descriptors with their confidences, the best supported first, and the summary."""
    found = json.loads(row["descriptors"])
    return tuple(sorted(((one["descriptor"], one["confidence"]) for one in found), key=lambda one: -one[1])), row["summary"]


class _Stage:
    """One annotation stage of a bundle: model, prompt and settings."""

    def __init__(self, folder: Path, stage: str, settings: Mapping[str, Any]) -> None:
        model = folder / settings["model"] if settings.get("in_bundle") else settings["model"]
        prompt = Prompt(settings["prompt"]["text"], settings["prompt"]["sha256"], settings["prompt"]["name"])
        unread = CatalogConfig(items=Path("unread"))
        given = {**settings["settings"], "model": model, "catalog": unread, "out": Path("unread")}
        self.config = build(CaptionConfig if stage == "caption" else InterestsConfig, given, source=str(folder / FILE_NAME), section=stage)
        self.stage, self.fields = stage, settings["fields"]
        record, parse = (Interests, parse_interests) if isinstance(self.config, InterestsConfig) else record_of(self.config)
        self.task = Task(stage, prompt, record, parse, self._picture, any_picture=True, confidence=confidence_of(self.config))
        self.generator: Generator = build_generator(self.config, record)
        self.cache = _LatestAnswers()
        self._ads: Sequence[Ad] = ()

    def rows(self, ads: Sequence[Ad], captions: Sequence[str]) -> list[dict[str, Any]]:
        """One row per ad, as in an annotation folder."""
        self._ads = ads
        inputs = [self._input(place, ad, caption) for place, (ad, caption) in enumerate(zip(ads, captions, strict=True))]
        with Annotator(self.task, self.generator, self.config, self.cache) as annotator:
            steps = annotator.rows(inputs)
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value

    def _input(self, place: int, ad: Ad, caption: str) -> JobInput:
        texts = {name: text for name, text in item_evidence(ad.item, caption).items() if name in self.fields}
        pictures = tuple((place, at) for at in range(len(ad.pictures))) if "picture" in self.fields else ()
        if self.stage == "caption" and not pictures:
            return JobInput(str(place), reason="no_picture")
        if not pictures and not any(texts.values()):
            return JobInput(str(place), reason="no_picture" if "picture" in self.fields else "no_evidence")
        return JobInput(str(place), 0, pictures, evidence_json(**texts) if texts else "")

    def _picture(self, key: tuple[int, int]) -> Any:
        picture = self._ads[key[0]].pictures[key[1]].copy()
        return masked(picture, self.config)


class _LatestAnswers:
    """The latest valid answers by the hash of the request (`mmsid.annotate.annotator.Cache`)."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        return {key: self._kept[key] for key in keys if key in self._kept}

    def put(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        for key, result in results.items():
            self._kept[key] = dict(result)
            while len(self._kept) > KEPT_ANSWERS:
                self._kept.popitem(last=False)
