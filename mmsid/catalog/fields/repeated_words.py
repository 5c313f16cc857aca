"""Test for keyword stuffing on many texts at once: no text is missed, and few texts are found that are not stuffed.

The words of a text are counted by a hash of their first four characters. No word occurs more often than its hash.
"""

from __future__ import annotations

import numpy as np

_COUNTED_TEXTS, _COUNTED_CHARACTERS = 2048, 262_144  # counted at once: fits into the processor's cache
_SHORTEST_STUFFED = 19  # characters of five words of three letters


def letter_class(character: str) -> int:
    """Class of a character: 0 outside of words, 1 for digits, 2 to 255 for other characters of words."""
    if not (character.isalnum() or character == "_"):
        return 0
    return 1 if character.isdigit() else 2 + ord(character) % 254


def may_be_stuffed(offsets: np.ndarray, characters: np.ndarray, are_classes: bool) -> np.ndarray:
    """Indices of the texts in which words that begin alike occur often enough for stuffing.

    Args:
        offsets: (N + 1,) bounds of the texts in `characters`.
        characters: (C,) uint8 ASCII characters, or classes of the case-folded characters as `letter_class` gives them.
        are_classes: whether `characters` are classes.
    """
    result = np.zeros(len(offsets) - 1, dtype=bool)
    start = 0
    while start < len(result):
        end = int(np.searchsorted(offsets, offsets[start] + _COUNTED_CHARACTERS))
        end = min(max(end, start + 1), start + _COUNTED_TEXTS, len(result))
        bounds = offsets[start : end + 1]
        if np.diff(bounds).max() >= _SHORTEST_STUFFED:
            letters, digits = _letters(characters[bounds[0] : bounds[-1]], are_classes)
            result[start:end] = _counted(bounds - bounds[0], letters, digits)
        start = end
    return np.flatnonzero(result)


def _letters(characters: np.ndarray, are_classes: bool) -> tuple[np.ndarray, np.ndarray]:
    """Letters of words as numbers (0 outside of words, three zeros at the end), and whether a character is a digit."""
    letters = np.zeros(len(characters) + 3, dtype=np.uint8)
    if are_classes:
        letters[:-3] = characters
        return letters, characters == 1
    digits = (characters - np.uint8(ord("0"))) < 10
    lower = characters | np.uint8(32)
    inside = (lower - np.uint8(ord("a"))) < 26
    inside |= digits
    inside |= characters == ord("_")
    np.multiply(lower, inside, out=letters[:-3])
    return letters, digits


def _counted(offsets: np.ndarray, letters: np.ndarray, digits: np.ndarray) -> np.ndarray:
    count = len(offsets) - 1
    inside = letters != 0
    starts = inside[:-3] & inside[1:-2] & inside[2:-1]  # words of three characters or more
    first = offsets[:-1][offsets[:-1] < offsets[1:]]
    is_first = starts[first]
    starts[1:] &= ~inside[:-4]
    starts[first] = is_first  # a text does not continue the text before
    words = np.flatnonzero(starts)
    bounds = np.searchsorted(words, offsets)
    per_text = np.diff(bounds)
    if per_text.max() < 5:
        return np.zeros(count, dtype=bool)
    bins = 256 if len(words) > 16 * count else 64  # more for long texts, in which two words more often share a hash
    fourth = letters[3:] * np.uint8(59)
    fourth[offsets[1:][offsets[1:] >= 3] - 3] = 0  # the fourth character is in the next text
    hashes = letters[:-3] * np.uint8(7) + letters[1:-2] * np.uint8(31) + letters[2:-1] * np.uint8(97) + fourth
    keys = np.repeat(np.arange(0, count * bins, bins), per_text) + (hashes[words] & np.uint8(bins - 1))
    most = np.bincount(keys, minlength=count * bins).reshape(count, bins).max(axis=1)
    result = most >= 5
    if result.any():
        # words of digits do not count, and the last word may have been read on into the next text
        sure = per_text - np.diff(np.searchsorted(np.flatnonzero(starts & digits), offsets)) - 1
        result &= most * 5 >= sure
    return result
