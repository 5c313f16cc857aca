"""Model card of a recommender folder."""

from __future__ import annotations

from collections.abc import Mapping

from mmsid.recommend.recommender_files import RecommenderState


def recommender_card(state: RecommenderState, identity: Mapping[str, str], figures: Mapping[str, float]) -> str:
    """README.md of a recommender folder: what it contains, how it is used, measured metrics, limits."""
    sources, table = state.sources, state.table
    later = int((state.added > 0).sum())
    rows = [
        ("items", f"{len(table):,}" + (f", of which {later:,} were added after training" if later else "")),
        ("items without interactions", f"{int((sources.counts == 0).sum()):,}"),
        ("interactions it was trained with", f"{int(sources.counts.sum()):,}"),
        ("levels x codes of the Semantic IDs", " x ".join(map(str, [table.num_levels, *sorted(set(table.codebook_sizes))]))),
        ("embedding", "none" if sources.embedding is None else f"{sources.embedding.embeddings.shape[1]} dimensions"),
        ("hash of item ids and codes", identity["sids_sha256"][:12]),
        ("tokenizer", identity["tokenizer_sha256"][:12] or "unknown"),
        *((name, f"{value:.4f}") for name, value in figures.items()),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: mmsid
tags: [semantic-ids, recommendation]
---
# Hybrid recommender

It proposes candidates by beam search over Semantic IDs, by embeddings, co-engagement, words and labels, and ranks them together.

```python
from mmsid import Recommender

recommender = Recommender.from_pretrained("this folder")
found = recommender.recommend([["an item id", "a later item id"]], k=10)
```

| | |
|---|---|
{lines}

New items are added with `add_items` or `grow`, without training. The Semantic IDs must be those of the tokenizer named above; known items
must keep their codes. The interactions of the training data are in the folder as counts and sums over users: item pairs with their
weights, and the number of interactions per item. It holds no user ids and no histories.
"""
