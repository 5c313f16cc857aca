"""TF-IDF vectors of the words and of the labels of items.

A vectoriser is fitted once, on the catalogue that a recommender is trained with. Later items are transformed with its
vocabulary and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from mmsid.catalog.item import Item

MAX_TERMS = 1 << 18  # the most frequent terms of a vocabulary are kept


class Vectorizers(NamedTuple):
    """Fitted vectorisers of words and labels; None where no item has any."""

    words: TfidfVectorizer | None
    labels: TfidfVectorizer | None

    def transform(self, items: Sequence[Item]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Vectors of the words and of the labels of items, (n, V) each. Unknown terms are left out."""
        return _transform(self.words, [item_text(item) for item in items]), _transform(self.labels, [item_labels(item) for item in items])


def fit_vectorizers(items: Sequence[Item]) -> tuple[Vectorizers, sparse.csr_matrix, sparse.csr_matrix]:
    """Vectorisers and the vectors of words and labels, (N, V) each."""
    (words, word_vectors), (labels, label_vectors) = fit_words(items), fit_labels(items)
    return Vectorizers(words, labels), word_vectors, label_vectors


def fit_words(items: Sequence[Item]) -> tuple[TfidfVectorizer | None, sparse.csr_matrix]:
    """TF-IDF of words and bigrams that occur in at least two items: vectoriser and vectors float32 (N, V), rows of norm one or zero.

    The vectoriser is None for a catalogue without such words.
    """
    return _fit(words_vectorizer(max_features=MAX_TERMS), [item_text(item) for item in items])


def fit_labels(items: Sequence[Item]) -> tuple[TfidfVectorizer | None, sparse.csr_matrix]:
    """TF-IDF of attribute labels and category names, each label one term: vectoriser and vectors, as `fit_words`."""
    return _fit(labels_vectorizer(max_features=MAX_TERMS), [item_labels(item) for item in items])


def words_vectorizer(**settings: object) -> TfidfVectorizer:
    """Unfitted vectoriser of `item_text`."""
    return TfidfVectorizer(**({"sublinear_tf": True, "min_df": 2, "ngram_range": (1, 2), "dtype": np.float32} | settings))


def labels_vectorizer(**settings: object) -> TfidfVectorizer:
    """Unfitted vectoriser of `item_labels`."""
    return TfidfVectorizer(**({"analyzer": _unchanged, "dtype": np.float32} | settings))


def _unchanged(terms: list[str]) -> list[str]:
    return terms


def item_text(item: Item) -> str:
    """Text of an item: title, labels, categories and description."""
    labels = [label for _, values in sorted(item.attributes.items()) for label in values]
    categories = [name for name in item.categories if name not in labels]  # a column may be mapped to both
    return " ".join([item.title, *labels, *categories, item.description])


def item_labels(item: Item) -> list[str]:
    """Labels of an item as terms, for example `brand=x` and `category=shoes`."""
    labels = [f"{name}={label}" for name, values in sorted(item.attributes.items()) for label in values]
    return labels + [f"category={name}" for name in item.categories]


def _fit(vectorizer: TfidfVectorizer, documents: list) -> tuple[TfidfVectorizer | None, sparse.csr_matrix]:
    try:
        return vectorizer, vectorizer.fit_transform(documents).tocsr()
    except ValueError:  # raised by scikit-learn for an empty vocabulary
        return None, sparse.csr_matrix((len(documents), 1), dtype=np.float32)


def _transform(vectorizer: TfidfVectorizer | None, documents: list) -> sparse.csr_matrix:
    if vectorizer is None:
        return sparse.csr_matrix((len(documents), 1), dtype=np.float32)
    return vectorizer.transform(documents).tocsr()
