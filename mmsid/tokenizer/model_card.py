"""Model cards of tokenizers, and of bundles of a tokenizer and its Semantic IDs."""

from __future__ import annotations

from typing import Any

from mmsid.sids import SidTable
from mmsid.tokenizer.model import ItemTokenizer


def model_card(tokenizer: ItemTokenizer, config: Any, figures: dict[str, Any], items: int) -> str:
    """README.md of a tokenizer folder: architecture, training, metrics, limitations."""
    agreement = figures.get("agreement_with_targets")
    rows = [
        ("items measured (a sample, raw codes, before collision handling)", f"{figures['items']:,}"),
        ("perplexity per level", " / ".join(f"{value:.1f}" for value in figures["perplexity"])),
        ("share of items that collide in the sample", f"{figures['in_collision']:.3f}"),
    ]
    if agreement is not None:
        rows.append(("agreement with the balanced target codes per level", " / ".join(f"{value:.3f}" for value in agreement)))
    rows += [(f"loss `{name}`, mean of the last steps", f"{value:.4f}") for name, value in figures.get("losses_last_steps", {}).items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: mmsid
tags: [semantic-ids, recommendation]
---
# Item tokenizer

{tokenizer.describe()}

Trained by `mmsid train_tokenizer` on {items:,} items: loss `{config.loss}`, {config.steps} steps of {config.batch_size} items x
{config.accumulate}, seed {config.seed}.

| measured | |
|---|---|
{table}

The metrics are those of training items. Metrics of published codes (after collision handling) and on held-out users are in
`intrinsic.json` of the folder that `mmsid assign` writes. The backbone weights are not in this folder: it stores a reference to them and
their hash, and refuses other weights. All items without text (and, for a vision-language backbone, without picture) get the same codes.
"""


def published_card(version: str, table: SidTable, metrics: dict[str, Any]) -> str:
    """Model card section of a bundle about its Semantic IDs: number, quality, and how to extend them."""
    lift = metrics.get("coengagement", {}).get("lift", [None])[0]
    rows = [
        ("items", f"{len(table):,}"),
        ("levels x codes", " x ".join(map(str, [table.num_levels, *sorted(set(table.codebook_sizes))]))),
        ("items lost to collisions, published (raw)", f"{metrics['published']['items_lost']:,} ({metrics['raw']['items_lost']:,})"),
        ("perplexity per level", " / ".join(f"{level['perplexity']:.1f}" for level in metrics["levels"])),
        ("level-1 co-engagement lift on held-out users", "not measured" if lift is None else f"{lift:.1f}"),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""## Published Semantic IDs, version {version}

| measured | |
|---|---|
{lines}

`sids/sids.parquet` contains `codes` (published) and `raw_codes` (from `encode`) of every item. Codes of different versions have different
meanings and must not be mixed. To add new items, run `mmsid assign --append` on the folder `sids`, with this folder as the tokenizer;
published codes do not change.
"""
