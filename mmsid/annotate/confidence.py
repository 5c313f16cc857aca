"""Answers of which a model is not sure, by the mean log-probability of the tokens of their texts (`generator.Answer`).

The limits compare the stored value, rounded to three decimals, so that they do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

LOW_CONFIDENCE = "low_confidence"  # the flag of a row, and the reason of a refused one
CUT_SHORT = "cut_short"  # the flag of an answer that the token budget or the longest length of a text ended


@dataclass(frozen=True)
class Confidence:
    """The limit below which an answer is uncertain, and why such an answer is refused.

    Attributes:
        least: the lowest mean log-probability of a certain answer.
        refusal: what a refused row says; None: an uncertain answer is flagged and kept.
    """

    least: float
    refusal: str | None = None

    def uncertain(self, log_probability: float | None) -> bool:
        """True below the limit. An answer of unknown probability is not uncertain."""
        return log_probability is not None and log_probability < self.least


# exp(-1): on average the model gave its own words less than 37 %. docs/annotation.md names what was measured.
ANY_MODEL = Confidence(least=-1.0)

# The shipped model writes a caption for any picture. Captions: .5 % of 400 drawn ads are below this limit (cropped to .9: .5 %), 97.3 % of
# 400 product photos and 88.7 % of 400 film posters. Interests: 1 % of 200 drawn ads, 32 % of the photos, 38.5 % of the posters.
DEMO_MODEL = Confidence(least=-0.05, refusal="`demo` reads drawn demo ads only and is not sure of this picture; name another model")


def rounded(log_probability: float | None) -> float | None:
    """The log-probability as it is stored: three decimals, because the last digits of a sum depend on the batch."""
    return None if log_probability is None else round(log_probability, 3) + 0.0
