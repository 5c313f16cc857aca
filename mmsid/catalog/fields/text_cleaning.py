"""Titles and descriptions of a batch: HTML removed, length limited, problems found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.fields.html_text import LONGEST_HTML, MAYBE_HTML, without_html
from mmsid.catalog.fields.text_bytes import rows_with
from mmsid.catalog.fields.text_detectors import batch_text_problems
from mmsid.catalog.prompt_injection import clean

MAX_CHARACTERS = {"title": 2_000, "description": 20_000}  # longer texts are cut; models read a few hundred words at most
HTML, CUT = "html", "cut"


@dataclass(frozen=True)
class CleanedTexts:
    """N cleaned texts.

    Attributes:
        texts: the cleaned texts.
        problems: index -> codes without the name of the field, for texts with problems.
        originals: index -> text before cleaning, for texts that changed.
    """

    texts: pa.LargeStringArray
    problems: dict[int, tuple[str, ...]]
    originals: dict[int, str]


def cleaned_texts(texts: pa.LargeStringArray, max_characters: int, clean_text: bool, one_line: bool = False) -> CleanedTexts:
    """Remove HTML, cut long texts, and find the problems of `prompt_injection.text_problems`.

    Args:
        texts: (N,) without nulls.
        max_characters: length at which texts are cut.
        clean_text: also remove what is found (`prompt_injection.clean`).
        one_line: join the lines of HTML with spaces, for titles.
    """
    changed: dict[int, str] = {}
    problems: dict[int, list[str]] = {}
    marked = rows_with(texts, "<&")
    for index in marked[np.flatnonzero(pc.match_substring_regex(texts.take(pa.array(marked)), MAYBE_HTML))].tolist():
        text = texts[index].as_py()
        plain = without_html(text)
        if plain != text:
            changed[index] = plain.replace("\n", " ") if one_line else plain
            problems[index] = [HTML, CUT] if len(text) > LONGEST_HTML else [HTML]
    for index in np.flatnonzero(pc.greater(pc.binary_length(texts), max_characters)).tolist():
        text = changed.get(index, texts[index].as_py())
        if len(text) > max_characters:
            changed[index] = text[:max_characters].rstrip()
            problems[index] = [*problems.get(index, [])[:1], CUT]
    result = replaced(texts, changed)
    for index, codes in batch_text_problems(result).items():
        problems.setdefault(index, []).extend(codes)
        if clean_text:
            changed[index] = clean(result[index].as_py())
    result = replaced(texts, changed) if clean_text else result
    return CleanedTexts(
        result,
        {index: tuple(codes) for index, codes in sorted(problems.items())},
        {index: original for index in sorted(changed) if (original := texts[index].as_py()) != changed[index]},
    )


def replaced(texts: pa.LargeStringArray, changed: dict[int, str]) -> pa.LargeStringArray:
    """`texts` with the texts at the keys of `changed` replaced."""
    if not changed:
        return texts
    mask = np.zeros(len(texts), dtype=bool)
    order = sorted(changed)
    mask[order] = True
    return pc.replace_with_mask(texts, pa.array(mask), pa.array([changed[index] for index in order], pa.large_string()))
