"""The model card that travels with a tokenizer."""

from __future__ import annotations

from typing import Any

from mmsid.tokenizer.model import ItemTokenizer


def model_card(tokenizer: ItemTokenizer, config: Any, figures: dict[str, Any], items: int) -> str:
    """README.md of a tokenizer folder: what it is, how it was trained, what was measured, what it cannot do."""
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

The figures are of training items. Figures of the published codes (after collision handling), and on held-out users, are in the
`intrinsic.json` of the folder that `mmsid assign` writes. The backbone's weights are not in this folder: it names them, and
refuses others. Items with no text (and, for a vision-language backbone, no picture) all get one and the same code.
"""
