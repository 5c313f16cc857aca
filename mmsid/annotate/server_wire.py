"""Chat completions on the wire: messages of a request, the answer that is read from a body, and the words of an error."""

from __future__ import annotations

import base64
import email.utils
import io
import json
import math
import re
import time
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from mmsid.annotate.answer_text import in_values
from mmsid.annotate.generator import GenerationFailure, Request

_QUOTED = 300  # characters of a server's error


@dataclass(frozen=True)
class ServerAnswer:
    """A chat completion. None: the server did not say.

    Attributes:
        text: of the answer.
        model: name of the model that the server used.
        tokens: number of tokens that the server counted.
        cut: whether the token limit ended the answer.
        log_probability: mean natural log-probability of the answer's tokens, as in `generator.Answer`.
    """

    text: str
    model: str | None = None
    tokens: int | None = None
    cut: bool = False
    log_probability: float | None = None


def messages(request: Request, picture_format: Literal["png", "jpeg"], system: str | None = None) -> list[dict[str, Any]]:
    """The messages of a request. Content without pictures is a string, because some servers know no other form."""
    content: Any = request.prompt
    if request.pictures:
        pictures = [{"type": "image_url", "image_url": {"url": data_url(picture, picture_format)}} for picture in request.pictures]
        content = [*pictures, {"type": "text", "text": request.prompt}]
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]


def data_url(picture: Image.Image, picture_format: Literal["png", "jpeg"]) -> str:
    """Encode the pixels as `data:image/...;base64,...`. Metadata of the file is not sent."""
    encoded = io.BytesIO()
    picture.save(encoded, picture_format, **({"quality": 90} if picture_format == "jpeg" else {"compress_level": 1}))
    return f"data:image/{picture_format};base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def read_answer(body: str) -> ServerAnswer | GenerationFailure:
    """Text of a chat completion, or a failure.

    The failures: `server_garbled` for a truncated or malformed body or one without text, `reasoning_only` for a model that reasoned and
    gave no answer, `content_filter`. The text of the field `refusal` is returned like an answer; the job detects refusals.
    """
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        content = message.get("refusal") or message["content"]
        reasoning = message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return GenerationFailure("server_garbled", f"not a chat completion: {body[:100]}")
    if ended == "content_filter":
        return GenerationFailure("content_filter", "the content filter of the server blocked the answer")
    if not isinstance(content, str) or not content.strip():
        if isinstance(reasoning, str) and reasoning.strip():
            cut = "its tokens ran out; raise max_new_tokens, or" if ended == "length" else "raise max_new_tokens, or"
            return GenerationFailure(
                "reasoning_only",
                f"the model wrote {len(reasoning):,} characters of reasoning and no answer: {cut} switch the reasoning off "
                "(template_arguments, or an option of the server)",
            )
        return GenerationFailure("server_garbled", f"a chat completion without text: {str(content)[:100]}")
    model, usage = data.get("model"), data.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return ServerAnswer(
        content,
        model=model if isinstance(model, str) and model else None,
        tokens=tokens if isinstance(tokens, int) else None,
        cut=ended == "length",
        log_probability=mean_log_probability(choice.get("logprobs")),
    )


def mean_log_probability(logprobs: Any) -> float | None:
    """Mean log-probability of the tokens of a JSON answer that belong to its texts and numbers, else of all tokens; None if not given."""
    try:
        tokens = [(token["token"], token.get("bytes"), float(token["logprob"])) for token in logprobs["content"]]
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    pieces = [bytes(data) if data else str(text).encode() for text, data, _ in tokens]
    inside = in_values(pieces) if b"".join(pieces).lstrip().startswith(b"{") else [True] * len(pieces)
    counted = [value for (_, _, value), counts in zip(tokens, inside) if counts and math.isfinite(value)]
    return sum(counted) / len(counted) if counted else None


def error_words(body: str) -> str:
    """What a server says in the body of an error: the message of its JSON, or the text without markup; at most 300 characters."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = re.sub(r"<[^>]*>", " ", body)
    for name in ("error", "message", "detail"):
        if isinstance(data, dict) and data.get(name):
            data = data[name]
    words = " ".join((data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)).split())
    return words[:_QUOTED] or "no text"


def retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, given as seconds or as a date; None if it is invalid."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if 0.0 < seconds < 86_400.0 else None
