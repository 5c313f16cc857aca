"""A caption template such as "a {color} {pattern} {product} by {brand}": writes captions from fields and reads fields from captions."""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIELD = re.compile(r"\{(\w+)\}")


class CaptionTemplate:
    """Both directions of one template. A word "a" just before a field becomes "an" before a vowel.

    Reading is non-greedy and needs the fixed pieces in place; values come back as they stand, so one garbled word costs one field.
    Where two fields touch with only a blank between them, `vocabularies` (field -> known values) tells how many words each has;
    without it every field but the last of such a run is one word.
    """

    def __init__(self, template: str, vocabularies: Mapping[str, list[str]] | None = None):
        self.template = template
        self.fields: list[str] = _FIELD.findall(template)
        if not self.fields or len(set(self.fields)) != len(self.fields):
            raise ValueError(f"caption_template {template!r} must name at least one field in braces, each once")
        self._pieces = _FIELD.split(template)
        self.literals = [piece for piece in self._pieces[0::2] if piece.strip()]
        self._exact = re.compile(self._pattern(vocabularies)) if vocabularies else None
        self._loose = re.compile(self._pattern(None))

    def _pattern(self, vocabularies: Mapping[str, list[str]] | None) -> str:
        pattern = ""
        pieces = self._pieces
        for position in range(0, len(pieces) - 1, 2):
            pattern += self._literal(pieces[position])
            field, after = pieces[position + 1], pieces[position + 2]
            known = (vocabularies or {}).get(field)
            if known:
                pattern += f"(?P<{field}>{'|'.join(re.escape(str(value)) for value in sorted(known, key=lambda v: -len(str(v))))})"
            else:
                pattern += rf"(?P<{field}>\S+)" if after == " " else rf"(?P<{field}>\S(?:.*?\S)?)"
        return pattern + self._literal(pieces[-1])

    @staticmethod
    def _literal(piece: str) -> str:
        return re.sub(r"(?:(?<=^)|(?<=\\ ))a\\ $", r"an?\\ ", re.escape(piece))

    def write(self, values: Mapping[str, object]) -> str:
        """The caption of these fields.

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
        """The fields of a caption, or None when the fixed pieces do not fit."""
        caption = caption.strip()
        match = (self._exact.fullmatch(caption) if self._exact else None) or self._loose.fullmatch(caption)
        return match.groupdict() if match else None
