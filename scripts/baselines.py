"""Semantic IDs of baseline methods: random, RQ-KMeans, Sinkhorn-balanced RQ.

Reads: the catalogue of the configuration and its annotations. Writes: `runs/<name>/baselines/<method>/` (SID folders).
Command: python scripts/baselines.py --config configs/demo.yaml [baselines.methods=[random]]
Departure from the papers: RQ-KMeans is fitted on the tokenizer's [text ; train co-engagement] vectors, so that only the quantizer differs.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("baselines")
