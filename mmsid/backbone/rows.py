"""Batches of rows that a processor has tokenized one by one: padding of tokens and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Row = Mapping[str, Tensor]
CROSS_ATTENTION = "cross_attention_mask"  # of Mllama


def per_token_keys(rows: Sequence[Row]) -> list[str]:
    """Inputs besides `input_ids` with one integer per token, such as token types."""
    return sorted(
        {
            key
            for row in rows
            for key, value in row.items()
            if key != "input_ids" and value.shape == row["input_ids"].shape and not value.is_floating_point()
        }
    )


def stack_rows(rows: Sequence[Row], pad_token: int, *, left: bool) -> dict[str, Tensor]:
    """Batch rows: tokens (B, T) and `attention_mask` (B, T), padded on the left (generation) or right; pictures as `stack_pictures`."""
    lengths = [row["input_ids"].shape[1] for row in rows]
    width, keys = max(lengths), per_token_keys(rows)
    batch = {"input_ids": torch.full((len(rows), width), pad_token, dtype=torch.int64)}
    batch |= {key: torch.zeros(len(rows), width, dtype=torch.int64) for key in ("attention_mask", *keys)}
    for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        span = slice(width - length, width) if left else slice(length)
        batch["attention_mask"][at, span] = 1
        for key in ("input_ids", *(key for key in keys if key in row)):
            batch[key][at, span] = row[key][0]
    if left and any(CROSS_ATTENTION in row for row in rows):  # (1, T, pictures, tiles), the only input besides ids that grows with T
        rows = [{key: _to_the_right(value, width) if key == CROSS_ATTENTION else value for key, value in row.items()} for row in rows]
    return batch | other_inputs(rows, batch)


def _to_the_right(mask: Tensor, width: int) -> Tensor:
    """Pad axis 1 on the left to `width`."""
    return torch.cat([mask.new_zeros(mask.shape[0], width - mask.shape[1], *mask.shape[2:]), mask], 1)


def other_inputs(rows: Sequence[Row], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that are not per token, stacked along their first axis."""
    keys = sorted({key for row in rows for key in row} - known.keys())
    return {key: stack_pictures([row[key] for row in rows if key in row]) for key in keys}


def stack_pictures(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis; further axes of different length (pictures, tiles, height, width) are padded with zeros."""
    if len({part.shape[1:] for part in parts}) > 1:
        longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        parts = [_padded(part, longest) for part in parts]
    return torch.cat(list(parts), 0)


def _padded(part: Tensor, longest: Sequence[int]) -> Tensor:
    padding = [amount for size, found in zip(reversed(longest), reversed(part.shape[1:])) for amount in (0, size - found)]
    return torch.nn.functional.pad(part, padding)
