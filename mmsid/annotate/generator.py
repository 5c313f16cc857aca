"""Interface between annotation jobs and generators (models in this process, servers, or the co-engagement miner)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Request:
    """One request to a generator: the rendered prompt, its pictures (RGB) and the decoding options.

    `temperature` 0 is greedy decoding. Above 0 the answer is sampled with `seed`, and does not depend on the rest of the batch.
    """

    prompt: str
    pictures: tuple[Image.Image, ...] = ()
    temperature: float = 0.0
    seed: int = 0


class Answer(str):
    """A generator's answer: its text, with what the generator knows about it. A plain `str` is an answer without such knowledge.

    Attributes:
        log_probability: mean natural log-probability, under the model without constraint, of the tokens that form the answer's texts
            and numbers. Keys, punctuation, and tokens that a constraint chose instead of the model do not count. None: not known.
        cut_short: whether the token budget or the longest length of the schema ended a text or a list before the model did.
    """

    log_probability: float | None
    cut_short: bool

    def __new__(cls, text: str, *, log_probability: float | None = None, cut_short: bool = False) -> Answer:
        answer = super().__new__(cls, text)
        answer.log_probability, answer.cut_short = log_probability, cut_short
        return answer


@dataclass(frozen=True)
class GenerationFailure:
    """A request without an answer (time-out, out of memory): a short reason code, and a detail for people."""

    reason: str
    detail: str = ""


# Reasons caused by a server or a machine, not by the input. A resumed job tries these rows again.
TRANSIENT = frozenset({"server_timeout", "server_busy", "server_error", "server_unreachable", "server_garbled", "out_of_memory"})

# Reasons that another attempt with the same settings does not change. A job does not ask these requests again.
FINAL = frozenset({"reasoning_only", "model_refused", "low_confidence"})


DEFAULT_BATCH_SIZE = 16


class Generator(Protocol):
    """Answers requests in order, with one text or failure each.

    A text may be an `Answer`, which also holds the model's confidence.

    Five attributes are optional. `batch_size` is the number of requests per call if the configuration names none. `constrained` says
    whether every answer is held to the record's JSON schema. `max_concurrent_calls` (default 1) is the number of `generate` calls in
    flight, each in its own thread, so that the next batch is prepared while the current one is generated. `close()` cancels running
    calls and releases connections; a later `generate` connects again. `take_notes()` returns counts since its last call, which the job
    adds to the counts of its work in the manifest. The Ray engine needs a generator that can be pickled.
    """

    model_id: str

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything besides model and request that can change an answer (token limit, dtype). It is part of the cache key."""
        ...

    def generate(self, requests: list[Request]) -> list[str | GenerationFailure]:
        """Answer every request. The list has the length and order of `requests`."""
        ...
