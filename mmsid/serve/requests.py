"""Bodies of requests: JSON of one or many ads, or a form with pictures, as records that `read_ad` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile

RequestT = TypeVar("RequestT", bound=BaseModel)
TEXTS = ("item_id", "title", "description", "caption")
LISTS = ("categories", "interests")
OPTIONS = ("k", "pictures")


class BadRequest(Exception):
    """The body is not what the route reads. The message is for the client."""


def parse_json(body: bytes, model: type[RequestT], many: str | None = None) -> RequestT:
    """A request from its JSON.

    Args:
        many: key of the list; a body without it is one element, with the options `k` and `pictures` beside its keys.

    Raises:
        BadRequest: no JSON, or not of this form. The message names the first keys that are wrong.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:200]}") from error
    if many is not None and isinstance(data, dict) and many not in data:
        options = {name: data[name] for name in OPTIONS if name in data}
        data = {many: [{name: value for name, value in data.items() if name not in options}], **options}
    return checked(data, model)


def checked(data: Any, model: type[RequestT]) -> RequestT:
    """A request from plain values. Raises BadRequest."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in error.errors(include_input=False)[:3]]
        raise BadRequest("; ".join(problems)) from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply") from error


async def parse_form(form: FormData, many: str) -> tuple[dict[str, Any], list[list[bytes]]]:
    """A form as request values without pictures, and the picture files of each ad.

    One file, or none, is one ad with the text fields of the form. With several files each is an ad of its own, and text fields are given
    once per file or not at all. `categories` and `interests` may be repeated for one ad; `attributes` is a JSON object.

    Raises:
        BadRequest: an unknown field, a text where a file belongs, or counts that differ.
    """
    values: dict[str, list[Any]] = {}
    for name, value in form.multi_items():
        values.setdefault(name, []).append(value)
    unknown = [name for name in values if name not in (*TEXTS, *LISTS, *OPTIONS, "attributes", "image")]
    if unknown:
        raise BadRequest(f"unknown field {unknown[0][:100]!r}; known: image, {', '.join((*TEXTS, *LISTS, 'attributes', *OPTIONS))}")
    files = [one for one in values.pop("image", []) if not isinstance(one, str) or one]
    if any(not isinstance(one, UploadFile) for one in files):
        raise BadRequest("field image holds a text; send a picture file")
    if any(isinstance(one, UploadFile) for found in values.values() for one in found):
        raise BadRequest("only the field image may hold files")
    options = {name: _option(name, values.pop(name)[-1]) for name in OPTIONS if name in values}
    count = max(1, len(files))
    ads: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, found in values.items():
        if count == 1 and name in LISTS:
            ads[0][name] = [text for text in found if text]
        elif len(found) != count:
            raise BadRequest(f"field {name} occurs {len(found)} times for {count} pictures; give it once per picture or not at all")
        else:
            for ad, text in zip(ads, found, strict=True):
                if text:
                    ad[name] = _attributes(text) if name == "attributes" else [text] if name in LISTS else text
    pictures = [[await one.read()] for one in files] or [[]]
    return {many: ads, **options}, pictures


def _option(name: str, text: str) -> Any:
    if name == "pictures":
        return text.lower() in ("true", "1", "on", "yes")
    try:
        return int(text)
    except ValueError as error:
        raise BadRequest(f"field {name} is {text[:100]!r}, expected a whole number") from error


def _attributes(text: str) -> Mapping[str, Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest("field attributes is not a JSON object") from error
