"""Semantic IDs for multimodal ads and products.

The names in `__all__` are the public API. They are imported on first use, so that `import mmsid` stays fast.
Everything else is private and may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmsid._version import __version__

_EXPORTS = {
    "Bundle": "mmsid.tokenizer.bundle",
    "Catalog": "mmsid.catalog",
    "Item": "mmsid.catalog",
    "ItemTokenizer": "mmsid.tokenizer.model",
    "MmsidError": "mmsid.errors",
    "Recommendations": "mmsid.recommend.recommender",
    "Recommender": "mmsid.recommend.recommender",
    "SidTable": "mmsid.sids",
    "Trie": "mmsid.sids",
    "TrieLogitsProcessor": "mmsid.recommend.trie_constraint",
    "assign": "mmsid.api",
    "baselines": "mmsid.api",
    "bundle": "mmsid.api",
    "caption": "mmsid.api",
    "export_sids": "mmsid.api",
    "ingest": "mmsid.api",
    "initialize_sid_rows": "mmsid.export.text_model",
    "inspect_sids": "mmsid.api",
    "interests": "mmsid.api",
    "judge": "mmsid.api",
    "load_bundle": "mmsid.tokenizer.bundle",
    "quantize_vectors": "mmsid.api",
    "refine_tokenizer": "mmsid.api",
    "stability": "mmsid.api",
    "train_captioner": "mmsid.api",
    "train_recommender": "mmsid.api",
    "train_recommender_rl": "mmsid.api",
    "train_sid_reward": "mmsid.api",
    "train_text_quality": "mmsid.api",
    "train_tokenizer": "mmsid.api",
    "write_recommendations": "mmsid.api",
    "write_report": "mmsid.api",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from mmsid.api import assign as assign
    from mmsid.api import baselines as baselines
    from mmsid.api import bundle as bundle
    from mmsid.api import caption as caption
    from mmsid.api import export_sids as export_sids
    from mmsid.api import ingest as ingest
    from mmsid.api import inspect_sids as inspect_sids
    from mmsid.api import interests as interests
    from mmsid.api import judge as judge
    from mmsid.api import quantize_vectors as quantize_vectors
    from mmsid.api import refine_tokenizer as refine_tokenizer
    from mmsid.api import stability as stability
    from mmsid.api import train_captioner as train_captioner
    from mmsid.api import train_recommender as train_recommender
    from mmsid.api import train_recommender_rl as train_recommender_rl
    from mmsid.api import train_sid_reward as train_sid_reward
    from mmsid.api import train_text_quality as train_text_quality
    from mmsid.api import train_tokenizer as train_tokenizer
    from mmsid.api import write_recommendations as write_recommendations
    from mmsid.api import write_report as write_report
    from mmsid.catalog import Catalog as Catalog
    from mmsid.catalog import Item as Item
    from mmsid.errors import MmsidError as MmsidError
    from mmsid.export.text_model import initialize_sid_rows as initialize_sid_rows
    from mmsid.recommend.recommender import Recommendations as Recommendations
    from mmsid.recommend.recommender import Recommender as Recommender
    from mmsid.recommend.trie_constraint import TrieLogitsProcessor as TrieLogitsProcessor
    from mmsid.sids import SidTable as SidTable
    from mmsid.sids import Trie as Trie
    from mmsid.tokenizer.bundle import Bundle as Bundle
    from mmsid.tokenizer.bundle import load_bundle as load_bundle
    from mmsid.tokenizer.model import ItemTokenizer as ItemTokenizer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmsid' has no attribute {name!r}; the public API is {', '.join(_EXPORTS)}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
