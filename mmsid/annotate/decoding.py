"""Choice of the next tokens of a batch: greedy or sampled, under a JSON schema or free, with the log-probability of every choice.

A row's choices do not depend on the other rows of its batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from mmsid.annotate.generator import Answer, Request
from mmsid.annotate.structured_output import ConstrainedAnswer, JsonConstraint

_VALUES = re.compile(rb'"(?P<text>(?:[^"\\]|\\.)*)"(?P<key>\s*:)?|(?P<number>-?\d[\d.]*)', re.DOTALL)


class SeededGumbel(LogitsProcessor):
    """Turns greedy decoding into sampling: argmax(logits / T + Gumbel noise) is a sample of softmax(logits / T).

    Every row has its own random generator, seeded by its request, so a sample does not depend on the batch.
    """

    def __init__(self, requests: list[Request]) -> None:
        self._temperatures = torch.tensor([request.temperature for request in requests])
        self._generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores (B, V) -> noisy scores (B, V)."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self._generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
        return scores / self._temperatures.to(scores.device)[:, None] + gumbel.to(scores.device, scores.dtype)


class AnswerDecoder(LogitsProcessor):
    """Chooses every next token of a batch of answers.

    Args:
        requests: of the batch, all greedy or all sampled.
        constraint: the schema that the answers follow; None: free answers, which end with the model's end token.
        end_tokens: the model's end tokens.

    Attributes:
        done: per row, whether its answer is finished.
    """

    def __init__(self, requests: list[Request], constraint: JsonConstraint | None, end_tokens: Iterable[int]) -> None:
        self._noise = SeededGumbel(requests) if requests[0].temperature > 0 else None
        self._constraint, self._end_tokens = constraint, frozenset(end_tokens)
        self._answers: list[ConstrainedAnswer] = [] if constraint is None else [constraint.answer() for _ in requests]
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._own: list[list[bool]] = [[] for _ in requests]  # False: the constraint replaced the model's choice
        self._log_probabilities: list[torch.Tensor] = []  # (B,) per step
        self.done = [False] * len(requests)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores (B, V) of the model -> scores whose argmax is the chosen token."""
        noisy = scores if self._noise is None else self._noise(input_ids, scores)
        tokens = noisy.argmax(1).tolist()
        for row, preferred in enumerate(tokens):
            if self.done[row]:
                continue
            if self._constraint is None:
                self.done[row] = preferred in self._end_tokens
            else:
                tokens[row] = self._answers[row].next_token(preferred, noisy[row])
                self.done[row] = self._answers[row].complete
            self._tokens[row].append(tokens[row])
            self._own[row].append(tokens[row] == preferred)
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        self._log_probabilities.append(scores.gather(1, chosen)[:, 0].float() - scores.float().logsumexp(1))
        return noisy.scatter_(1, chosen, torch.inf)

    def answers(self, tokenizer: Any) -> list[Answer]:
        """The finished answers: text, mean log-probability of the text's tokens, and whether the constraint cut the text short."""
        steps = torch.stack(self._log_probabilities, 1).tolist() if self._log_probabilities else [[] for _ in self._tokens]
        texts = tokenizer.batch_decode(self._tokens, skip_special_tokens=True)
        return [self._answer(row, text, steps[row]) for row, text in enumerate(texts)]

    def _answer(self, row: int, text: str, log_probabilities: list[float]) -> Answer:
        tokens = self._tokens[row]
        counted = [own and token not in self._end_tokens for own, token in zip(self._own[row], tokens)]
        cut_short = False
        if self._constraint is not None:
            pieces = [self._constraint.tokenizer.decode_bytes([token]) for token in tokens]
            counted = [own and inside for own, inside in zip(counted, in_values(pieces))]
            cut_short = self._answers[row].cut_short or self._constraint.outline.reaches_a_limit(text)
        kept = [value for value, kept in zip(log_probabilities, counted) if kept]
        return Answer(text, log_probability=sum(kept) / len(kept) if kept else None, cut_short=cut_short)


class AllDone(StoppingCriteria):
    """Ends the rows of a batch whose answers are finished."""

    def __init__(self, decoder: AnswerDecoder) -> None:
        self._decoder = decoder

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **options: Any) -> torch.BoolTensor:
        """Whether each row is finished, (B,)."""
        return torch.tensor(self._decoder.done, device=input_ids.device)


def in_values(pieces: Sequence[bytes]) -> list[bool]:
    """Which tokens of a JSON text, given as bytes, hold characters of a text or a number. Keys, quotes and punctuation are neither."""
    data = b"".join(pieces)
    inside = bytearray(len(data))
    for found in _VALUES.finditer(data):
        start, end = found.span("number" if found["number"] else "text")
        if found["key"] is None:
            inside[start:end] = b"\1" * (end - start)
    counted, at = [], 0
    for piece in pieces:
        counted.append(any(inside[at : at + len(piece)]))
        at += len(piece)
    return counted
