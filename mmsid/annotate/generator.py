"""What a job asks of a generator. In-process models and servers stand behind this one door."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Request:
    """One thing to answer: the rendered prompt, its pictures (RGB), how to decode.

    `temperature` 0 is greedy. Above 0 the answer is drawn with `seed`, and is the same whatever shares the batch.
    """

    prompt: str
    pictures: tuple[Image.Image, ...] = ()
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class GenerationFailure:
    """A request that got no text (time-out, out of memory): a short reason code and a detail for people."""

    reason: str
    detail: str = ""


# Reasons that lie with a server or a machine, not with the input: a job that is resumed tries these rows again.
PASSING = frozenset({"server_timeout", "server_busy", "server_error", "server_unreachable", "server_garbled", "out_of_memory"})


class Generator(Protocol):
    """Answers requests in order, one text or failure each. It may run them at once, in batches, or against a server.

    Two attributes are optional. `calls_at_once` (default 1): how many `generate` calls to have under way, each in a thread of its
    own, so that the next batch is at hand when the last is answered. `close()`: end what is under way and let go of connections;
    a later `generate` starts anew. For the Ray engine a generator must pickle, and be the same after it.
    """

    model_id: str

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything beside model and request that can change an answer (token limit, dtype): part of the cache key."""
        ...

    def generate(self, requests: list[Request]) -> list[str | GenerationFailure]:
        """Answer every request; the list has the length and order of `requests`."""
        ...
