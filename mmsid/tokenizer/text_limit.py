"""Counts what the limit on text tokens (`backbone.max_length`) cuts off, because a long caption would hide the fields after it silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mmsid.tokenizer.inputs import FieldName


class CutTexts(NamedTuple):
    """Texts beyond the limit: their number, the length in tokens of the longest text, and per field how many are not read to the end."""

    items: int
    longest: int
    fields: dict[str, int]

    def describe(self, limit: int, count: int) -> str:
        """Sentence for a warning; `count` is the number of all items."""
        fields = ", ".join(f"{name} ({number:,})" for name, number in self.fields.items())
        return (
            f"train_tokenizer: backbone.max_length={limit} cuts the texts of {self.items:,} of {count:,} items; not read to the end: "
            f"{fields}. Raise backbone.max_length (the longest text has {self.longest} tokens), or read fewer fields (`use`)"
        )


def cut_texts(texts: Sequence[str], fields: Sequence[FieldName], tokenizer: PreTrainedTokenizerBase, limit: int) -> CutTexts | None:
    """What is cut off labelled texts (`mmsid.tokenizer.inputs`) after `limit` tokens, special tokens not counted; None if nothing."""
    if not texts:
        return None
    offsets = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    lost: dict[str, int] = {}
    cut = [(text, spans[limit - 1][1]) for text, spans in zip(texts, offsets, strict=True) if len(spans) > limit > 0]
    for text, end in cut:
        starts = _starts(text, fields)
        for place, (name, _) in enumerate(starts):
            stop = starts[place + 1][1] - 1 if place + 1 < len(starts) else len(text)
            if stop > end:
                lost[name] = lost.get(name, 0) + 1
    return CutTexts(len(cut), max(len(spans) for spans in offsets), {name: lost[name] for name in fields if name in lost}) if cut else None


def _starts(text: str, fields: Sequence[FieldName]) -> list[tuple[str, int]]:
    """Label and first character of every field in a text, in order."""
    found, after = [], 0
    for name in fields:
        place = text.find(f"{name}: ", after)
        if place >= 0:
            found.append((name, place))
            after = place + 1
    return found
