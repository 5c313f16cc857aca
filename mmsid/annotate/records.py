"""Captions, interests and judgements as typed records, parsed strictly from a model's JSON answer without any repair.

The rules follow DCIM (arXiv 2604.20861, section 2.2): duplicate keys, NaN and infinities, booleans as numbers, extra fields, and
descriptors that are equal after NFKC, casefold and whitespace normalisation are rejected. Forgiven is what instruction-tuned models
write around and inside a good object even where the prompt forbids it (`answer_text`): one leading `<think>` block, one line of prose
before the object, one code fence, and line breaks and direction marks inside a text.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmsid.annotate.answer_text import json_part, one_line, without_reasoning
from mmsid.annotate.text_flags import REFUSAL, normalise, refuses
from mmsid.errors import AnnotationError

SCHEMA_VERSION = 1
MAX_OUTPUT_CHARS = 20_000


def _one_line(text: str) -> str:
    text = one_line(text)
    if not normalise(text):
        raise ValueError("empty_text")
    return text


def _text(longest: int) -> Any:
    return Annotated[str, Field(strict=True, min_length=1, max_length=longest), AfterValidator(_one_line)]


CaptionText, DescriptorText, SummaryText = _text(600), _text(120), _text(400)


class Record(BaseModel):
    """Base class of the records: strict types, no extra fields, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def texts(self) -> list[str]:
        """The free texts of the record, for the detectors of `text_flags`; none by default."""
        return []


class Caption(Record):
    """Caption of one picture (CMSA), 1 to 600 characters."""

    caption: CaptionText

    def texts(self) -> list[str]:
        return [self.caption]


class Interest(Record):
    """One deep-interest descriptor (1 to 120 characters) and the model's confidence in it, in [0, 1]."""

    descriptor: DescriptorText
    confidence: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


Descriptors = Annotated[list[Interest], Field(min_length=1, max_length=8)]


class Interests(Record):
    """Interests of one item (DCIM): 1 to 8 descriptors, the best supported first, and a summary of 1 to 400 characters."""

    descriptors: Descriptors
    summary: SummaryText

    @model_validator(mode="after")
    def _distinct(self) -> Interests:
        names = [normalise(interest.descriptor) for interest in self.descriptors]
        if len(set(names)) != len(names):
            raise ValueError("duplicate_descriptor")
        return self

    def texts(self) -> list[str]:
        return [interest.descriptor for interest in self.descriptors] + [self.summary]


class CaptionWithInterests(Caption):
    """Caption of one picture and the interests of its item, from one request (`caption.with_interests`)."""

    descriptors: Descriptors
    summary: SummaryText

    @model_validator(mode="after")
    def _same_rules(self) -> CaptionWithInterests:
        self.interests()
        return self

    def interests(self) -> Interests:
        """The interests alone."""
        return Interests(descriptors=self.descriptors, summary=self.summary)

    def texts(self) -> list[str]:
        return [self.caption, *self.interests().texts()]


class Judgement(Record):
    """A judge's label of one descriptor: 1 if it is specific, usable and supported by the evidence, else 0."""

    label: Annotated[int, Field(ge=0, le=1)]

    def texts(self) -> list[str]:
        return []


RecordT = TypeVar("RecordT", bound=Record)


def parse_caption(text: str) -> Caption:
    """Parse `{"caption": "..."}`. Raises AnnotationError with a reason code."""
    return _parse(Caption, text)


def parse_interests(text: str) -> Interests:
    """Parse `{"descriptors": [{"descriptor", "confidence"}, ...], "summary": "..."}`. Raises AnnotationError with a reason code."""
    return _parse(Interests, text)


def parse_caption_with_interests(text: str) -> CaptionWithInterests:
    """Parse the fields of a caption and of interests in one object. Raises AnnotationError with a reason code."""
    return _parse(CaptionWithInterests, text)


def parse_judgement(text: str) -> Judgement:
    """Parse `{"label": 0 or 1}`. Raises AnnotationError with a reason code."""
    return _parse(Judgement, text)


def _parse(cls: type[RecordT], text: str) -> RecordT:
    data = strict_json(text)
    if not isinstance(data, dict):
        raise AnnotationError("not_an_object", f"expected a JSON object, found {type(data).__name__}")
    try:
        record = cls.model_validate(data)
    except ValidationError as error:
        raise AnnotationError(_reason(error), f"{cls.__name__}: {_problems(error)}") from error
    if any(refuses(part) for part in record.texts()):
        raise AnnotationError(REFUSAL, f"{cls.__name__}: the model declined instead of answering")
    return record


def strict_json(text: str) -> Any:
    """Decode one JSON document without duplicate keys, NaN or infinity, with nothing around it except what `answer_text` removes.

    Raises:
        AnnotationError: reason `empty_output`, `output_too_long`, `truncated`, `invalid_json`, `duplicate_key`, `not_finite`.
    """
    if not text or not text.strip():
        raise AnnotationError("empty_output", "the model wrote nothing")
    answer = without_reasoning(text)
    if not answer:
        raise AnnotationError("empty_output", "the model wrote nothing after its reasoning")
    if len(answer) > MAX_OUTPUT_CHARS:
        raise AnnotationError("output_too_long", f"{len(answer)} characters, at most {MAX_OUTPUT_CHARS}")
    body = json_part(answer)
    if refuses(answer) or refuses(body):
        raise AnnotationError(REFUSAL, "the model declined instead of answering")
    hooks = {"object_pairs_hook": _unique_keys, "parse_constant": _not_finite, "parse_float": _finite, "parse_int": _small_int}
    try:
        return json.loads(body, strict=False, **hooks)  # not strict: line breaks may stand unescaped inside a text
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(body)
        raise AnnotationError("truncated" if cut else "invalid_json", f"not JSON at character {error.pos}: {error.msg}") from error
    except RecursionError as error:
        raise AnnotationError("invalid_json", "nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise AnnotationError("duplicate_key", "a key occurs twice in one object")
    return dict(pairs)


def _not_finite(word: str) -> float:
    raise AnnotationError("not_finite", f"{word} is not a number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise AnnotationError("not_finite", "a number overflows")
    return value


def _small_int(digits: str) -> int:
    if len(digits) > 18:  # beyond 4,300 digits int() itself raises a ValueError without a code
        raise AnnotationError("number_out_of_range", "an integer of more than 18 digits")
    return int(digits)


_REASONS = {
    "extra_forbidden": "extra_field",
    "missing": "missing_field",
    "string_too_short": "empty_text",
    "string_too_long": "text_too_long",
    "too_short": "no_descriptors",
    "too_long": "too_many_descriptors",
    "greater_than_equal": "number_out_of_range",
    "less_than_equal": "number_out_of_range",
    "finite_number": "not_finite",
    "string_unicode": "control_character",  # a lone surrogate
}


def _reason(error: ValidationError) -> str:
    problem = error.errors()[0]
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return _REASONS.get(problem["type"], "wrong_type")


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'record'}: {problem['type']}" for problem in error.errors()[:5])
