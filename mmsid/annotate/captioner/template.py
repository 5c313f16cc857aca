"""Caption templates such as "a {color} {pattern} {product} by {brand}": captions from fields, and fields from captions."""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIELD = re.compile(r"\{(\w+)\}")


class CaptionTemplate:
    """Formats captions from field values and parses field values from captions.

    The word "a" before a field becomes "an" before a vowel. Parsing is non-greedy and requires the fixed pieces of the template. Unknown
    values are accepted, so that one garbled word makes one field wrong.

    Args:
        template: text with each field once in braces.
        vocabularies: field -> known values. Two fields that are separated by a blank only are split by these values. Without them
            every such field except the last is one word.

    Raises:
        ValueError: the template contains no field, or a field twice.
    """

    def __init__(self, template: str, vocabularies: Mapping[str, list[str]] | None = None):
        self.template = template
        self.fields: list[str] = _FIELD.findall(template)
        if not self.fields or len(set(self.fields)) != len(self.fields):
            raise ValueError(f"caption_template {template!r} must name at least one field in braces, each once")
        self._pieces = _FIELD.split(template)
        self.literals = [piece for piece in self._pieces[0::2] if piece.strip()]
        self._exact = re.compile(self._pattern(vocabularies)) if vocabularies else None
        self._loose = re.compile(self._pattern({}))

    def _pattern(self, vocabularies: Mapping[str, list[str]]) -> str:
        pattern = ""
        pieces = self._pieces
        for position in range(0, len(pieces) - 1, 2):
            pattern += self._literal(pieces[position])
            field, after = pieces[position + 1], pieces[position + 2]
            known = vocabularies.get(field)
            if known:
                pattern += f"(?P<{field}>{'|'.join(re.escape(str(value)) for value in sorted(known, key=lambda v: -len(str(v))))})"
            else:
                pattern += rf"(?P<{field}>\S+)" if after == " " else rf"(?P<{field}>\S(?:.*?\S)?)"
        return pattern + self._literal(pieces[-1])

    @staticmethod
    def _literal(piece: str) -> str:
        return re.sub(r"(?:(?<=^)|(?<=\\ ))a\\ $", r"an?\\ ", re.escape(piece))

    def write(self, values: Mapping[str, object]) -> str:
        """The caption of these field values.

        Raises:
            KeyError: a field of the template is missing from `values`.
        """
        text = ""
        for position in range(0, len(self._pieces) - 1, 2):
            value = str(values[self._pieces[position + 1]])
            piece = self._pieces[position]
            if re.search(r"(?:^|\s)[aA] $", piece) and value[:1].lower() in tuple("aeiou"):
                piece = piece[:-1] + "n "
            text += piece + value
        return text + self._pieces[-1]

    def read(self, caption: str) -> dict[str, str] | None:
        """The field values of a caption. None if the caption does not fit the template."""
        caption = caption.strip()
        match = (self._exact.fullmatch(caption) if self._exact else None) or self._loose.fullmatch(caption)
        return match.groupdict() if match else None
