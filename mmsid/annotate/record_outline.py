"""How an unfinished JSON record ends: the shortest text that completes it, and the number of tokens that this text needs.

The records of `records` are objects of texts, numbers and lists of such objects. Constrained decoding uses the outline to end every
answer within its token budget.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

TEXT_TOKENS = 16  # tokens that a text which has not begun keeps for itself
_NUMBER_TOKENS = 4  # "0.85"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NUMBER = re.compile(r"-?[\d.]*")
_WHOLE_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_SPACE = " \n"

Segments = list[str | int]


class Outline:
    """The shape of a record, from its JSON schema.

    Args:
        schema: of an object of required strings, numbers, integers, and arrays of such objects, in the order of their writing.
        count_tokens: number of tokens of a text.

    Raises:
        ValueError: the schema has another kind of value.
    """

    def __init__(self, schema: dict[str, Any], count_tokens: Callable[[str], int]) -> None:
        self._schema, self._count = schema, count_tokens
        self._costs: dict[str, int] = {}
        self.shortest = self.cost(self.rest(""))

    def rest(self, text: str) -> Segments:
        """What completes the record that begins with `text`: literal texts, and numbers of tokens kept for texts and numbers to come."""
        return self._walked(text).rest

    def cost(self, rest: Segments) -> int:
        """Number of tokens of a `rest`."""
        return sum(part if isinstance(part, int) else self._literal_cost(part) for part in rest)

    def reaches_a_limit(self, text: str) -> bool:
        """True if a text of the complete record is as long as its schema allows, so that the schema may have ended it."""
        return self._walked(text).reached_limit

    def _walked(self, text: str) -> _Walk:
        walk = _Walk(text, self._schema.get("$defs", {}))
        walk.value(self._schema)
        return walk

    def _literal_cost(self, text: str) -> int:
        if text not in self._costs:
            self._costs[text] = self._count(text)
        return self._costs[text]


class _Walk:
    """One pass over a record's text along its schema. `rest` is filled from the place where the text ends."""

    def __init__(self, text: str, definitions: dict[str, Any]) -> None:
        self.text, self.definitions = text, definitions
        self.rest: Segments = []
        self.reached_limit = False

    def value(self, schema: dict[str, Any]) -> None:
        if "$ref" in schema:
            schema = self.definitions[schema["$ref"].rsplit("/", 1)[-1]]
        kind = schema.get("type")
        if kind == "object":
            self._object(schema)
        elif kind == "array":
            self._array(schema)
        elif kind == "string":
            self._string(schema)
        elif kind in ("number", "integer"):
            self._number()
        else:
            raise ValueError(f"a record has no values of type {kind!r}")

    @property
    def _ended(self) -> bool:
        self.text = self.text.lstrip(_SPACE)
        return not self.text

    def _literal(self, piece: str) -> None:
        if self._ended:
            self._emit(piece)
        elif self.text.startswith(piece):
            self.text = self.text[len(piece) :]
        else:
            self._emit(piece[len(self.text) :])
            self.text = ""

    def _emit(self, piece: str) -> None:
        if self.rest and isinstance(self.rest[-1], str):
            self.rest[-1] += piece
        elif piece:
            self.rest.append(piece)

    def _object(self, schema: dict[str, Any]) -> None:
        for at, (name, inner) in enumerate(schema["properties"].items()):
            self._literal("," if at else "{")
            self._literal(f'"{name}"')
            self._literal(":")
            self.value(inner)
        self._literal("}")

    def _array(self, schema: dict[str, Any]) -> None:
        self._literal("[")
        self.value(schema["items"])
        while not self._ended and self.text.startswith(","):
            self.text = self.text[1:]
            self.value(schema["items"])
        self._literal("]")

    def _string(self, schema: dict[str, Any]) -> None:
        if self._ended:
            self._emit('"')
            self.rest.append(TEXT_TOKENS)
            self._emit('"')
            return
        found = _STRING.match(self.text)
        if found is None:
            if len(self.text) == 1:
                self.rest.append(TEXT_TOKENS)
            self._emit('"')
            self.text = ""
            return
        self.text = self.text[found.end() :]
        longest = schema.get("maxLength")
        self.reached_limit |= longest is not None and len(json.loads(found[0], strict=False)) >= longest

    def _number(self) -> None:
        if self._ended:
            self.rest.append(_NUMBER_TOKENS)
            return
        found = _NUMBER.match(self.text)
        if found.end() == len(self.text) and not _WHOLE_NUMBER.fullmatch(self.text):
            self.rest.append(2)
        self.text = self.text[found.end() :]
