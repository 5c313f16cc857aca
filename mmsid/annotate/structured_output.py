"""Answers that follow a JSON schema: a token that the schema does not allow at its place is replaced by one that it allows.

The grammar is llguidance's. A row's own choice is checked first and the mask over the vocabulary is computed only where the choice is
refused, so a model that writes good JSON by itself decodes as without the constraint.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

import llguidance
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import PreTrainedTokenizerFast

from mmsid.annotate.answer_text import FORBIDDEN_CHARACTERS
from mmsid.annotate.record_outline import Outline

# One space, or a new line with indentation: a model may write the style that it knows, but cannot fill its budget with whitespace.
_OPTIONS = {"whitespace_pattern": r" ?|\n {0,8}"}
_TEXT_PATTERN = rf"^[^{FORBIDDEN_CHARACTERS}\s][^{FORBIDDEN_CHARACTERS}]*$"
_SAMPLE = '{"caption": "a red shoe, 49 € [new]", "n": 0.85}'
SLACK = 2  # tokens
_SPLIT_CHARACTER = 4  # tokens that finish a character or an escape of which only a part is written


class UnreadableTokenizerError(ValueError):
    """The grammar library cannot read a tokenizer."""


class JsonConstraint:
    """The constraint of one schema for one tokenizer. Both are compiled once per process.

    Args:
        tokenizer: a fast tokenizer of transformers.
        schema: the record's JSON schema.
        max_new_tokens: the token budget in which every answer is completed.

    Raises:
        UnreadableTokenizerError: the tokenizer has no fast form, or one of a kind that the library does not know.
        ValueError: `max_new_tokens` is too small for the shortest record.
    """

    def __init__(self, tokenizer: Any, schema: dict[str, Any], max_new_tokens: int) -> None:
        self.tokenizer = readable_tokenizer(tokenizer)
        self._matcher = _compiled(self.tokenizer, json.dumps(_refined(schema)))
        self.outline = Outline(schema, lambda text: len(self.tokenizer.tokenize_str(text)))
        self.max_new_tokens = max_new_tokens
        shortest = self.outline.shortest + SLACK
        if max_new_tokens < shortest:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, but the shortest answer needs {shortest} tokens of this tokenizer")
        # a step adds at most one element of a list to what has to be written still
        self.closing_from = 2 * self.outline.shortest + SLACK + _SPLIT_CHARACTER

    def answer(self) -> ConstrainedAnswer:
        """A new, empty answer."""
        return ConstrainedAnswer(self, self._matcher.deep_copy())


class ConstrainedAnswer:
    """One answer that is being written under a constraint.

    Attributes:
        tokens: the tokens so far.
        complete: whether the record is closed.
        cut_short: whether the token budget ended a text or a list before the model did.
    """

    def __init__(self, constraint: JsonConstraint, matcher: LLMatcher) -> None:
        self._constraint, self._matcher = constraint, matcher
        self.tokens: list[int] = []
        self.complete = self.cut_short = False

    def next_token(self, preferred: int, scores: torch.Tensor) -> int:
        """Accept and return the next token: `preferred` if schema and budget allow it, else the one that stands in for it.

        Args:
            preferred: the model's choice, the argmax of `scores`.
            scores: (V,).
        """
        closing = self._constraint.max_new_tokens - len(self.tokens) <= self._constraint.closing_from
        if closing:
            token = self._within_budget(preferred, scores)
        elif preferred < self._constraint.tokenizer.vocab_size and self._matcher.try_consume_tokens([preferred]):
            token = preferred
        else:
            token = self._instead_of(preferred, scores)
            self._consume(token)
        self.tokens.append(token)
        self.complete = self._matcher.is_stopped()
        return token

    def text(self) -> str:
        """The text so far."""
        return self._bytes(self.tokens).decode("utf-8", "replace")

    def _within_budget(self, preferred: int, scores: torch.Tensor) -> int:
        """As `next_token`, but a token after which the record could not be completed any more is replaced by the end of what is open."""
        constraint, outline = self._constraint, self._constraint.outline
        token = preferred if self._allows(preferred) else self._instead_of(preferred, scores)
        left = constraint.max_new_tokens - len(self.tokens) - 1  # after this token
        text, split = _decoded(self._bytes([*self.tokens, token]))
        if outline.cost(outline.rest(text)) + split + SLACK > left:
            text, split = _decoded(self._bytes(self.tokens))
            rest = outline.rest(text)
            if not split and rest and isinstance(rest[0], str):
                for end in (constraint.tokenizer.tokenize_str(rest[0])[0], constraint.tokenizer.tokenize_str(rest[0][0])[0]):
                    if self._allows(end):
                        self.cut_short |= end != token
                        token = end
                        break
        self._consume(token)
        return token

    def _allows(self, token: int) -> bool:
        return token < self._constraint.tokenizer.vocab_size and self._matcher.validate_tokens([token]) == 1

    def _instead_of(self, refused: int, scores: torch.Tensor) -> int:
        """The longest allowed beginning of the refused token, else the allowed token of the highest score.

        A model that closes text and record in one token, where the record goes on, thus closes the text.
        """
        tokenizer = self._constraint.tokenizer
        written = tokenizer.decode_bytes([refused]) if refused < tokenizer.vocab_size and not tokenizer.is_special_token(refused) else b""
        for length in range(len(written) - 1, 0, -1):
            beginning = tokenizer.tokenize_bytes(written[:length])
            if len(beginning) == 1 and self._allows(beginning[0]):
                return beginning[0]
        bias = self._matcher.compute_logit_bias()  # one byte per token, 0 where it is not allowed
        allowed = torch.frombuffer(bytearray(bias), dtype=torch.uint8)[: len(scores)].to(scores.device) > 0
        return int(scores[: len(allowed)].masked_fill(~allowed, -torch.inf).argmax())

    def _consume(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"llguidance does not accept token {token} after {self.text()!r}: {self._matcher.get_error()}")

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return self._constraint.tokenizer.decode_bytes(list(tokens))


def readable_tokenizer(tokenizer: Any) -> LLTokenizer:
    """The tokenizer as the grammar library reads it.

    Raises:
        UnreadableTokenizerError: as for `JsonConstraint`.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnreadableTokenizerError(f"{type(tokenizer).__name__} is not a fast tokenizer")
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    found = _read(backend.to_str(), tokenizer.eos_token_id)
    written = found.decode_str(tokenizer.encode(_SAMPLE, add_special_tokens=False))
    if written.strip() != _SAMPLE:
        raise UnreadableTokenizerError(f"its tokens of {_SAMPLE!r} read as {written!r}")
    return found


@functools.lru_cache(maxsize=4)
def _read(serialized: str, eos_token: int | None) -> LLTokenizer:
    try:
        return LLTokenizer(serialized, eos_token=eos_token)
    except Exception as error:  # the library raises untyped exceptions
        raise UnreadableTokenizerError(str(error)) from error


@functools.lru_cache(maxsize=16)
def _compiled(tokenizer: LLTokenizer, schema: str) -> LLMatcher:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS))
    if matcher.is_error():
        raise ValueError(f"llguidance {llguidance.__version__} cannot compile the schema: {matcher.get_error()}")
    return matcher


def _refined(schema: Any) -> Any:
    """The schema with what a record's parser asks for besides: texts without control characters, numbers of two decimals."""
    if isinstance(schema, list):
        return [_refined(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    refined = {name: _refined(part) for name, part in schema.items()}
    if schema.get("type") == "string":
        refined["pattern"] = _TEXT_PATTERN
    elif schema.get("type") == "number":
        refined["multipleOf"] = 0.01
    return refined


def _decoded(data: bytes) -> tuple[str, int]:
    """The text of an answer so far, and the tokens that finish its last character or escape if only a part of it is written."""
    text = data.decode("utf-8", "ignore")
    escaped = (len(text) - len(text.rstrip("\\"))) % 2 == 1
    split = escaped or len(text.encode()) != len(data)
    return text[:-1] if escaped else text, _SPLIT_CHARACTER if split else 0
