"""Interest miner without a language model: key phrases of the items that users engage with together with an item (TF-IDF weighted).

With co-engagement weights w_ij and N items, n_p of which contain phrase p, the descriptors of item i are the phrases of highest
    score_i(p) = support_i(p) * (ln((1 + N) / (1 + n_p)) + 1),    support_i(p) = sum_j w_ij [p in j] / sum_j w_ij.
The support is the confidence. Such rows (`source` = "coengagement") are reconstruction targets and never encoder input.
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
MIN_ITEMS = 2  # a phrase of a single item names a thing, not an interest
MAX_PHRASES = 50_000  # size of the vocabulary: the phrases of the most items


class Phrase(NamedTuple):
    """A mined phrase and its support: the share in [0, 1] of the item's co-engagement weight whose items contain it."""

    text: str
    support: float


class CoengagementGenerator:
    """Generator that turns an item's ranked phrases (the prompt is `phrases_json`) into its record, without a model."""

    model_id = "coengagement-1"

    @property
    def parameters(self) -> dict[str, Any]:
        """Empty: the evidence determines the answer."""
        return {}

    def generate(self, requests: list[Request]) -> list[str]:
        """One JSON object of `records.Interests` per request."""
        return [self._record(json.loads(request.prompt)) for request in requests]

    def _record(self, phrases: list[list[Any]]) -> str:
        descriptors = [{"descriptor": text, "confidence": support} for text, support in phrases]
        return json.dumps({"descriptors": descriptors, "summary": ", ".join(text for text, _ in phrases)}, ensure_ascii=False)


def phrases_json(phrases: list[Phrase]) -> str:
    """Ranked phrases as the evidence text of a `JobInput`."""
    return json.dumps([[phrase.text, phrase.support] for phrase in phrases], ensure_ascii=False)


def mine_phrases(
    catalog: Catalog, weights: sparse.csr_matrix, captions: Mapping[str, str], *, num_descriptors: int = 5
) -> list[list[Phrase]]:
    """Key phrases of each item's co-engaged items, best first; an empty list for an item without co-engagement or phrases.

    Args:
        weights: (N, N) co-engagement of the fit histories, symmetric, 1 / distance, empty diagonal (`catalog.co_engagement`).
        captions: item id -> caption; may be empty.
        num_descriptors: largest number of phrases per item.
    """
    vocabulary, contains = _phrase_table([_phrases(item, captions.get(item.item_id, "")) for item in catalog.items])
    num_items = len(catalog.items)
    frequency = np.asarray(contains.sum(axis=0)).ravel()
    rarity = np.log((1 + num_items) / (1 + frequency)) + 1
    mined: list[list[Phrase]] = []
    for start in range(0, num_items, 1_024):  # in blocks, because the (items, phrases) product may exceed the available memory
        block = weights[start : start + 1_024]
        totals = np.asarray(block.sum(axis=1)).ravel()
        shares = (sparse.diags(np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)) @ block @ contains).tocsr()
        shares.sort_indices()
        for row in range(shares.shape[0]):
            inside = slice(shares.indptr[row], shares.indptr[row + 1])
            mined.append(_best(shares.indices[inside], shares.data[inside], rarity, vocabulary, num_descriptors))
    return mined


def _best(columns: np.ndarray, support: np.ndarray, rarity: np.ndarray, vocabulary: list[str], count: int) -> list[Phrase]:
    """The best phrases that each add a new word; ties go to the longer phrase, then to the alphabet."""
    scores = np.round(support * rarity[columns], 9)  # rounded, so that equal scores tie in any order of summation
    shortlist = np.argsort(-scores, kind="stable")[: 20 * count]
    lowest = scores[shortlist[-1]] if len(shortlist) else 0.0
    candidates = np.flatnonzero(scores >= lowest)
    ranked = sorted(candidates, key=lambda at: (-scores[at], -vocabulary[columns[at]].count(" "), vocabulary[columns[at]]))
    chosen: list[Phrase] = []
    used_words: set[str] = set()
    for at in ranked:
        words = set(vocabulary[columns[at]].split())
        if words <= used_words:
            continue
        used_words |= words
        chosen.append(Phrase(vocabulary[columns[at]], round(min(float(support[at]), 1.0), 4)))
        if len(chosen) == count:
            break
    return chosen


def _phrases(item: Item, caption: str) -> set[str]:
    """Words and word pairs of an item's texts without stop words; a pair lies within one field."""
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


def _phrase_table(phrases: list[set[str]]) -> tuple[list[str], sparse.csr_matrix]:
    """Vocabulary in alphabetical order, and the (N, P) 0/1 matrix of which item contains which phrase."""
    frequency = Counter(phrase for found in phrases for phrase in found)
    kept = sorted((phrase for phrase, count in frequency.items() if count >= MIN_ITEMS), key=lambda phrase: (-frequency[phrase], phrase))
    vocabulary = sorted(kept[:MAX_PHRASES])
    column = {phrase: at for at, phrase in enumerate(vocabulary)}
    columns = [sorted(column[phrase] for phrase in found if phrase in column) for found in phrases]
    pointers = np.concatenate([[0], np.cumsum([len(found) for found in columns])]).astype(np.int64)
    indices = np.array([at for found in columns for at in found], dtype=np.int64)
    return vocabulary, sparse.csr_matrix((np.ones(len(indices)), indices, pointers), shape=(len(phrases), len(vocabulary)))
