"""Lists and mappings written inside a text cell: JSON, Python literals as pandas writes them, and numpy's form without commas."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

_TOKEN = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"\[\](){}]+)"""
_NUMPY_LIST = re.compile(rf"\[\s*{_TOKEN}(?:\s+{_TOKEN})+\s*\]\Z")
_TOKENS = re.compile(_TOKEN)
_ARRAY = re.compile(r"array\((\[.*\])(?:,\s*dtype=\w+)?\)\Z", re.DOTALL)


def starts_like_literal(text: str) -> bool:
    """Whether a text cell starts like a list or a mapping."""
    return text.lstrip().startswith(("[", "{", "array(["))


def literal_cell(text: str) -> Any:
    """The list or mapping that a text cell holds: `["a", "b"]`, `['a', 'b']`, `['a' 'b']`, `{'a': 1}`. Nothing is evaluated.

    Raises:
        ValueError: the cell is none of these.
    """
    text = text.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        failure = str(error)
    if (array := _ARRAY.match(text)) is not None:
        text = array[1]
    if _NUMPY_LIST.match(text) is not None:
        tokens = _TOKENS.findall(text[1:-1])
        if "..." in tokens:
            raise ValueError("the list was shortened by numpy, so some of its values are lost")
        return [_value(token) for token in tokens]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, (list, tuple, dict)):
        raise ValueError(failure)
    return list(value) if isinstance(value, tuple) else value


def _value(token: str) -> Any:
    try:
        return ast.literal_eval(token)
    except (ValueError, SyntaxError):
        return None if token in ("nan", "None", "null", "NaN") else token
