"""Cleaning of a model's answer: what surrounds its JSON object, and characters inside its texts.

Characters are matched by explicit code points, so that the same answer gives the same record under every version of Python.
"""

from __future__ import annotations

import re

from mmsid.errors import AnnotationError

_LINE_BREAKS = re.compile("[ ]*[\t\n\v\f\r\x85\u2028\u2029]+\\s*")
# Format characters that change how a text is displayed or that carry hidden text: zero-width space, direction marks and overrides, word
# joiner, byte order mark, annotation anchors, language tags. ZWJ, ZWNJ, soft hyphen and variation selectors belong to words and emoji.
_FORMAT = re.compile("[\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]")
# Control characters, private use and noncharacters, as the inside of a character class. Surrogates are forbidden as well.
FORBIDDEN_CHARACTERS = "\x00-\x1f\x7f-\x9f\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff" + "".join(
    f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0x10000, 0xF0000, 0x10000)
)
_FORBIDDEN = re.compile(f"[{FORBIDDEN_CHARACTERS}\ud800-\udfff]")
_REASONING = re.compile(r"\A(?:<think>)?(?:(?!<think>).)*?</think>", re.DOTALL)
_PROSE = re.compile(r"\A[^\W\d_][^\n{}\[\]`<>]{0,198}\s*(?=[{`])")
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\r?\n(?P<body>.*)\r?\n```\Z", re.DOTALL | re.IGNORECASE)


def one_line(text: str) -> str:
    """The text on one line: line breaks and tabs become one space, direction marks and other format characters are removed.

    Raises:
        ValueError: "control_character", for control characters, surrogates, private-use characters and noncharacters.
    """
    text = _FORMAT.sub("", _LINE_BREAKS.sub(" ", text)).strip()
    if _FORBIDDEN.search(text):
        raise ValueError("control_character")
    return text


def excerpt(text: str, length: int = 300) -> str:
    """The first `length` characters of a rejected answer; line breaks, control and format characters become spaces."""
    return _FORBIDDEN.sub(" ", _FORMAT.sub(" ", re.sub("[\u2028\u2029]", " ", text[:length])))


def without_reasoning(text: str) -> str:
    """The answer without outer whitespace, a byte order mark, and one leading `<think>...</think>` block.

    The opening tag may be missing, because some chat templates write it at the end of the prompt.

    Raises:
        AnnotationError: reason `truncated`, the block has no end.
    """
    text = text.strip().removeprefix("\ufeff").lstrip()
    if text.startswith(("{", "[", '"', "```")):
        return text
    block = _REASONING.match(text)
    if block is None and text.startswith("<think>"):
        raise AnnotationError("truncated", "the answer ends inside its reasoning; raise max_new_tokens, or switch the reasoning off")
    return text if block is None else text[block.end() :].strip()


def json_part(text: str) -> str:
    """The JSON document of an answer without one line of prose before it and without one code fence around it."""
    prose = _PROSE.match(text)
    body = text if prose is None else text[prose.end() :]
    fenced = _FENCE.match(body)
    return fenced["body"].strip() if fenced and "```" not in fenced["body"] else body
