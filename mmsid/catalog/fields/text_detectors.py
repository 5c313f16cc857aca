"""`prompt_injection.text_problems` for a whole array of texts.

Three tests that no text with a problem passes pick the few texts that might have one. Only these go through the rules of
`prompt_injection` one by one, so the result is the same and a clean text costs well under a microsecond.

- Instruction: one RE2 expression that is wider than the expressions of `prompt_injection`, on the text itself when it is ASCII. Other
  texts are rewritten to ASCII first, character by character, as `prompt_injection` does it.
- Hidden text: a table of the characters that occur.
- Stuffing: the words of a text are counted by a hash of their first four characters. No word occurs more often than its hash.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.fields.repeated_words import letter_class, may_be_stuffed
from mmsid.catalog.fields.text_bytes import offsets_and_bytes
from mmsid.catalog.prompt_injection import (
    ALLOWED_FORMAT_CHARACTERS,
    HIDDEN,
    INSTRUCTION,
    LOOKALIKES,
    STUFFED,
    has_instruction,
    is_hidden,
    is_stuffed,
)

_UNICODE = 0x110000  # number of code points
_OTHER_LETTER, _OTHER_SIGN = "\x01", "\x02"  # stand for characters that no rule looks for

_SPACE, _WORD = "[\\t-\\r\\x1c-\\x20]", "[\\w@$\\x01]"
_DISGUISES = {"o": "[o0]", "i": "[i1]", "e": "[e3]", "a": "[a4@]", "s": "[s5$]", "t": "[t7]", "b": "[b8]"}


_THING = "(?:item|product|image|picture|photo|ad|listing)"
_FILLER = "_FILLER_"
_RULES = [  # wider than `prompt_injection`: no word bounds, and only the beginning of a last word
    "(?:ignore|disregard|forget|override|bypass|skip)_FILLER_"
    "(?:above|previous|prior|earlier|preceding|system|instruction|prompt|rules|message)",
    f"(?:call|describe|label|classify|caption|tag|treat|present|report|categori(?:s|z)e)_(?:this|the_{_THING})_a",
    "(?:describe|label|classify|caption|tag|report|categori(?:s|z)e)_it_as",
    "(?:answer|reply|respond|output)_(?:only|with|exactly)|(?:say|write|state|pretend|claim)_that_(?:this|the|it)",
    "do_not_(?:describe|mention|report|read|follow)|you_are_now|you_are_an?_(?:ai|assistant|model)|from_now_on",
    "new_instruction|system_prompt|(?:note|attention|message|instructions?)_(?:to|for|all)_(?:the_)?(?:ai|model|assistant|bot)",
    r"<\||\[/?inst\]|</?(?:system|user|assistant)>|^#(?:system|assistant)#$",
]


def _wide(space: str, filler: str) -> str:
    """The rules as one RE2 expression in which each letter also stands for its disguises, and `_` for `space`."""
    parts = []
    for rule in _RULES:
        pieces = [_wide_piece(piece, space) for piece in rule.split(_FILLER)]
        parts.append(filler.join(pieces))
    return "|".join(parts)


def _wide_piece(rule: str, space: str) -> str:
    tokens = {"_": space, "#": f"{_SPACE}*"}
    escaped, wide = False, []
    for character in rule:
        wide.append(character if escaped else (tokens | _DISGUISES).get(character, character))
        escaped = character == "\\"
    return "".join(wide)


_INSTRUCTION = _wide(f"{_SPACE}+", f"{_SPACE}+(?:{_WORD}+{_SPACE}+){{0,3}}?")
_INSTRUCTION_WITHOUT_SPACES = _wide("", f"{_WORD}*")
_SPACED_OUT = f"(?:^|[^\\w\\x01])(?:{_WORD}{_SPACE}+){{2}}{_WORD}(?:$|[^\\w\\x01])"  # three letters or more, each on its own
_FIRST_TEST = f"{_INSTRUCTION}|{_SPACED_OUT}"


def batch_text_problems(texts: pa.LargeStringArray) -> dict[int, tuple[str, ...]]:
    """Index of each text that has a problem -> its codes, as `text_problems` gives them. `texts` has no nulls."""
    found: dict[int, list[str]] = {}
    is_ascii = pc.string_is_ascii(texts).to_numpy(zero_copy_only=False)
    for rows, ascii_texts in ((np.flatnonzero(is_ascii), True), (np.flatnonzero(~is_ascii), False)):
        if not len(rows):
            continue
        some = texts if len(rows) == len(texts) else texts.take(pa.array(rows))
        read = _read_ascii(some) if ascii_texts else _read_unicode(some)
        suspects = [
            (INSTRUCTION, _may_instruct(read.plain), has_instruction),
            (HIDDEN, read.hidden, None),
            (STUFFED, may_be_stuffed(read.offsets, read.characters, read.are_classes), is_stuffed),
        ]
        for code, indices, test in suspects:
            for index in indices.tolist():
                if test is None or test(some[index].as_py()):
                    found.setdefault(int(rows[index]), []).append(code)
    return {row: tuple(codes) for row, codes in sorted(found.items())}


@dataclass(frozen=True)
class _Read:
    """N texts as the tests read them.

    Attributes:
        plain: ASCII form for the expressions.
        offsets: (N + 1,) bounds of the texts in `characters`.
        characters: (C,) uint8 ASCII characters, or classes: 0 outside of words, 1 for digits, and other numbers for letters.
        are_classes: whether `characters` are classes.
        hidden: indices of the texts that contain hidden characters.
    """

    plain: pa.LargeStringArray
    offsets: np.ndarray
    characters: np.ndarray
    are_classes: bool
    hidden: np.ndarray


def _may_instruct(plain: pa.LargeStringArray) -> np.ndarray:
    """Indices of the texts that might be instructions. Joining spaced-out letters removes white space only."""
    first = np.flatnonzero(_matches(plain, _FIRST_TEST))
    if not len(first):
        return first
    plain = plain.take(pa.array(first))
    unspaced = pc.replace_substring_regex(plain, f"{_SPACE}+", "")
    spaced_out = pc.and_(_matches(plain, _SPACED_OUT), _matches(unspaced, _INSTRUCTION_WITHOUT_SPACES))
    return first[pc.or_(spaced_out, _matches(plain, _INSTRUCTION)).to_numpy(zero_copy_only=False)]


def _matches(texts: pa.LargeStringArray, expression: str) -> pa.BooleanArray:
    return pc.match_substring_regex(texts, expression, ignore_case=True)


def _read_ascii(texts: pa.LargeStringArray) -> _Read:
    offsets, data = offsets_and_bytes(texts)
    return _Read(texts, offsets, data, False, np.empty(0, dtype=np.int64))


def _read_unicode(texts: pa.LargeStringArray) -> _Read:
    joined = offsets_and_bytes(texts)[1].tobytes().decode("utf-8")
    codes = np.frombuffer(joined.encode("utf-32-le"), dtype=np.uint32)
    offsets = np.concatenate([[0], np.cumsum(pc.utf8_length(texts).to_numpy())]).astype(np.int64)
    present = np.zeros(_UNICODE, dtype=bool)
    present[codes] = True
    distinct = np.flatnonzero(present)
    place = np.zeros(_UNICODE, dtype=np.int32)
    place[distinct] = np.arange(len(distinct))
    which = place[codes]
    facts = [_character(int(code)) for code in distinct]
    plain, bounds = _expand(which, offsets, [fact[0] for fact in facts])
    classes, class_bounds = _expand(which, offsets, [fact[1] for fact in facts])
    hidden_at = np.flatnonzero(np.array([fact[2] for fact in facts])[which])
    hidden = np.unique(np.searchsorted(offsets, hidden_at, side="right") - 1)
    rewritten = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(bounds), pa.py_buffer(plain))
    return _Read(rewritten, class_bounds, classes, True, hidden)


def _expand(which: np.ndarray, offsets: np.ndarray, replacements: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Replace character `which[i]` by `replacements[which[i]]`. Returns the bytes and the bounds of the texts in them."""
    lengths = np.array([len(replacement) for replacement in replacements])
    table = np.frombuffer(b"".join(replacements), dtype=np.uint8)
    begin = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    if (lengths == 1).all():
        return table[which], offsets
    each = lengths[which]
    ends = np.concatenate([[0], np.cumsum(each)])
    within = np.arange(ends[-1]) - np.repeat(ends[:-1], each)
    return table[np.repeat(begin[which], each) + within], ends[offsets]


@lru_cache(maxsize=65_536)
def _character(code: int) -> tuple[bytes, bytes, bool]:
    """How `prompt_injection` reads one character: its ASCII form, the classes of its case-folded form, and whether it is hidden."""
    character = chr(code)
    hidden = is_hidden(character)
    plain = ""
    if not hidden:
        decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", character).casefold())
        plain = "".join(map(_ascii_form, decomposed))
    return plain.encode("ascii"), bytes(map(letter_class, character.casefold())), hidden


def _ascii_form(character: str) -> str:
    if unicodedata.combining(character) or character in ALLOWED_FORMAT_CHARACTERS:
        return ""
    character = character if character.isascii() else character.translate(LOOKALIKES)
    if character.isascii():
        return character
    return " " if character.isspace() else _OTHER_LETTER if character.isalnum() else _OTHER_SIGN
