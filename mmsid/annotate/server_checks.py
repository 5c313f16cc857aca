"""Checks of what a server does with requests: the model that answers, the token limit, the JSON schema, errors that never end."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmsid.annotate.server_wire import ServerAnswer
from mmsid.errors import AnnotationError, ConfigError

LIMIT_NAMES = ("max_tokens", "max_completion_tokens")  # the first is known to most servers, the second to models that reject the first
_PASSING = (502, 503, 504)  # a proxy, or a server that still loads its model
_TOKEN_SLACK = 2  # some servers count end tokens


class ServerChecks:
    """State of one connection to a server.

    Attributes:
        limit_name: name under which the token limit is sent.
        log_probabilities: whether they are asked for; False after the server refused them.
        answered: completions that the server gave so far.
        notes: counts for the manifest: `schema_held`, `schema_broken`, `schema_cut_off` (by the token limit), `over_token_limit`, and
            `answered_by NAME`.

    Args:
        model: name that is asked for.
        address: of the server, for messages.
        max_new_tokens: token limit.
        schema: JSON schema that is sent, or None.
        patience: equal errors before the first completion after which the server counts as broken.

    Raises:
        ConfigError: a schema is sent and the package `jsonschema` is missing.
    """

    def __init__(self, model: str, address: str, max_new_tokens: int, schema: dict[str, Any] | None, patience: int) -> None:
        self.model, self.address, self.max_new_tokens, self.patience = model, address, max_new_tokens, patience
        self.limit_name = LIMIT_NAMES[0]
        self.log_probabilities = True
        self.answered = 0
        self.notes: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._ignored: set[str] = set()  # names of the token limit that the server did not keep to
        self._schema = None if schema is None else _validator(schema)

    def switch_limit_name(self, tried: set[str]) -> bool:
        """Use a name for the token limit that is not among `tried`. False if there is none."""
        untried = [name for name in LIMIT_NAMES if name not in tried]
        if untried:
            self.limit_name = untried[0]
        return bool(untried)

    def over_limit(self, answer: ServerAnswer) -> bool:
        """True if the server counted more tokens than it was allowed to write."""
        return answer.tokens is not None and answer.tokens > self.max_new_tokens + _TOKEN_SLACK

    def ignores_limit(self, answer: ServerAnswer, name: str) -> bool:
        """True if the server ignored the limit under `name` and may know the other name, which is then used from now on."""
        if not self.over_limit(answer):
            return False
        self._ignored.add(name)
        return self.switch_limit_name(self._ignored)

    def add_answer(self, answer: ServerAnswer) -> None:
        """Count an accepted answer."""
        self.notes["over_token_limit"] += self.over_limit(answer)
        if answer.model is not None:
            self.notes[f"answered_by {answer.model}"] += 1
        if self._schema is not None:
            self.notes["schema_held" if self._fits(answer.text) else "schema_cut_off" if answer.cut else "schema_broken"] += 1

    def take_notes(self) -> Counter[str]:
        """The counts since the last call, without zeros."""
        notes, self.notes = self.notes, Counter()
        return +notes

    def check_error(self, status: int, words: str) -> None:
        """Count a server error.

        Raises:
            AnnotationError: reason `server_broken`, if the server has answered nothing but this error, `patience` times.
        """
        if self.answered or status < 500 or status in _PASSING:
            return
        text = re.sub(r"\b(?=\w*\d)[\w-]+", "#", f"{status}: {words}")  # numbers and request ids differ between equal errors
        self._errors[text] += 1
        if self._errors[text] >= self.patience:
            raise AnnotationError(
                "server_broken",
                f"{self.address} answered the first {self._errors[text]} requests with the same error, {status}: {words}. "
                "Correct the server, the model or the request (max_new_tokens, server.json_schema, picture_format) and run again.",
            )

    def wrong_model(self, listed: list[str] | None, said: str) -> ConfigError:
        """The error for a model that the server does not have. `listed`: the models of the server, None if it lists none."""
        has = f"it lists {', '.join(map(repr, listed[:5]))}{' and more' if len(listed) > 5 else ''}" if listed else "it lists no models"
        return ConfigError(f"{self.address} has no model {self.model!r} ({said}; {has}); correct model or server.base_url")

    def _fits(self, text: str) -> bool:
        try:
            return self._schema.is_valid(json.loads(text))
        except (ValueError, RecursionError):
            return False


def server_problems(work: Mapping[str, int]) -> list[str]:
    """What a server did other than it was asked to, from the counts of a job; one sentence each."""
    problems = []
    if broken := work.get("schema_broken", 0):
        whole = broken + work.get("schema_held", 0)
        problems.append(
            f"{broken:,} of {whole:,} whole answers do not fit the JSON schema that was sent (server.json_schema): "
            "the server ignores it, or a part of it. Every row was checked all the same."
        )
    if over := work.get("over_token_limit", 0):
        problems.append(
            f"{over:,} answers are longer than max_new_tokens, under both names of the limit ({', '.join(LIMIT_NAMES)}): "
            "set a limit on the server, because long answers cost time."
        )
    return problems


def same_model(asked: str, answered: str) -> bool:
    """True if two names can mean one model.

    Servers add a date (`m-2026-08-06`), a tag (`m:latest`) or a revision (`m@main`), and leave out folders or the ending `.gguf`.
    """
    names = [_plain_name(name) for name in (asked, answered)]
    return names[0] == names[1] or re.fullmatch(re.escape(names[0]) + r"-\d[\d-]*", names[1]) is not None


def named(model: str, words: str) -> bool:
    """True if `words` contain the model's name as a word of its own."""
    return re.search(rf"(?<![\w-]){re.escape(model)}(?![\w-])", words) is not None


def _plain_name(name: str) -> str:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()
    return re.split("[@:]", last)[0].removesuffix(".gguf")


def _validator(schema: dict[str, Any]) -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise ConfigError("server.json_schema needs the package jsonschema; install it with: pip install 'mmsid[openai]'") from error
    return Draft202012Validator(schema)
