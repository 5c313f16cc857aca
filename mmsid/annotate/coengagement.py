"""An honest interest miner without any language model: what do the items say that people engage with beside this one?

For item i with neighbours j of weight w_ij (co-engagement in the fit part of train, symmetric, 1 / distance), a phrase p gets

    support_i(p) = sum_j w_ij [p in j] / sum_j w_ij        score_i(p) = support_i(p) * (ln((1 + N) / (1 + n_p)) + 1)

with N items, n_p of which hold the phrase. Descriptors are the best-scored phrases, confidence is the support. The rows are
reconstruction targets only (`source` = "coengagement"): they speak of behaviour, which no encoder may read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from mmsid.annotate.generator import Request
from mmsid.annotate.text_flags import normalise
from mmsid.catalog import Catalog, Item

_WORD = re.compile(r"[^\W\d_][\w'’-]{1,39}")


class Phrase(NamedTuple):
    """A mined phrase and its support, the share in [0, 1] of the item's co-engagement whose items hold it."""

    text: str
    support: float


class CoengagementGenerator:
    """Writes the record of an item from its ranked phrases (the request's prompt is `evidence_of`): no model is involved."""

    model_id = "coengagement-1"

    @property
    def parameters(self) -> dict[str, Any]:
        """None: the evidence holds everything."""
        return {}

    def generate(self, requests: list[Request]) -> list[str]:
        """One JSON object of `records.Interests` per request."""
        return [self._record(json.loads(request.prompt)) for request in requests]

    def _record(self, phrases: list[list[Any]]) -> str:
        descriptors = [{"descriptor": text, "confidence": support} for text, support in phrases]
        return json.dumps({"descriptors": descriptors, "summary": ", ".join(text for text, _ in phrases)}, ensure_ascii=False)


def evidence_of(phrases: list[Phrase]) -> str:
    """Ranked phrases as the evidence text of a unit."""
    return json.dumps([[phrase.text, phrase.support] for phrase in phrases], ensure_ascii=False)


def mine(
    catalog: Catalog,
    weights: sparse.csr_matrix,
    captions: Mapping[str, str],
    *,
    num_descriptors: int = 5,
    min_items: int = 2,
    max_phrases: int = 50_000,
) -> list[list[Phrase]]:
    """Key phrases of each item's co-engaged items, best first; an empty list where there is no co-engagement (or no phrase).

    Args:
        weights: (N, N) co-engagement of the fit histories, empty diagonal (`catalog.co_engagement`).
        captions: item id -> caption; may be empty.
        min_items: phrases of fewer items name a thing, not an interest.
        max_phrases: the vocabulary keeps the phrases of the most items.
    """
    vocabulary, held = _phrase_table([_phrases(item, captions.get(item.item_id, "")) for item in catalog.items], min_items, max_phrases)
    num_items = len(catalog.items)
    frequency = np.asarray(held.sum(axis=0)).ravel()
    rarity = np.log((1 + num_items) / (1 + frequency)) + 1
    mined: list[list[Phrase]] = []
    for start in range(0, num_items, 1_024):  # in blocks: the product of all items with all phrases need not fit in memory
        block = weights[start : start + 1_024]
        totals = np.asarray(block.sum(axis=1)).ravel()
        shares = (sparse.diags(np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)) @ block @ held).tocsr()
        shares.sort_indices()
        for row in range(shares.shape[0]):
            inside = slice(shares.indptr[row], shares.indptr[row + 1])
            mined.append(_best(shares.indices[inside], shares.data[inside], rarity, vocabulary, num_descriptors))
    return mined


def _best(columns: np.ndarray, support: np.ndarray, rarity: np.ndarray, vocabulary: list[str], count: int) -> list[Phrase]:
    """The best phrases that each say something new; ties go to the longer phrase, then by alphabet."""
    scores = np.round(support * rarity[columns], 9)  # rounded: equal scores must tie whatever the order of summation
    shortlist = np.argsort(-scores, kind="stable")[: 20 * count]
    floor = scores[shortlist[-1]] if len(shortlist) else 0.0
    candidates = np.flatnonzero(scores >= floor)
    ranked = sorted(candidates, key=lambda at: (-scores[at], -vocabulary[columns[at]].count(" "), vocabulary[columns[at]]))
    chosen: list[Phrase] = []
    said: set[str] = set()
    for at in ranked:
        words = set(vocabulary[columns[at]].split())
        if words <= said:
            continue
        said |= words
        chosen.append(Phrase(vocabulary[columns[at]], round(min(float(support[at]), 1.0), 4)))
        if len(chosen) == count:
            break
    return chosen


def _phrases(item: Item, caption: str) -> set[str]:
    """Words and pairs of neighbouring words of an item's texts; pairs never reach across fields or over a stop word."""
    found: set[str] = set()
    for text in (item.title, item.description, *item.categories, caption):
        words = _WORD.findall(normalise(text))
        found.update(word for word in words if word not in ENGLISH_STOP_WORDS)
        found.update(_pairs(words))
    return found


def _pairs(words: list[str]) -> Iterator[str]:
    for first, second in pairwise(words):
        if first not in ENGLISH_STOP_WORDS and second not in ENGLISH_STOP_WORDS and first != second:
            yield f"{first} {second}"


def _phrase_table(phrases: list[set[str]], min_items: int, max_phrases: int) -> tuple[list[str], sparse.csr_matrix]:
    """Vocabulary (alphabetical) and (N, P) 0/1 matrix of which item holds which phrase."""
    frequency = Counter(phrase for found in phrases for phrase in found)
    kept = sorted((phrase for phrase, count in frequency.items() if count >= min_items), key=lambda phrase: (-frequency[phrase], phrase))
    vocabulary = sorted(kept[:max_phrases])
    column = {phrase: at for at, phrase in enumerate(vocabulary)}
    columns = [sorted(column[phrase] for phrase in found if phrase in column) for found in phrases]
    pointers = np.concatenate([[0], np.cumsum([len(found) for found in columns])]).astype(np.int64)
    indices = np.array([at for found in columns for at in found], dtype=np.int64)
    return vocabulary, sparse.csr_matrix((np.ones(len(indices)), indices, pointers), shape=(len(phrases), len(vocabulary)))
