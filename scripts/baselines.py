"""SIDs that any tokenizer must beat: random, RQ-KMeans, Sinkhorn-balanced RQ.

Reads: the catalogue named in the configuration and its annotations. Writes: `runs/<name>/baselines/<arm>/` (SID folders).
Command: python scripts/baselines.py --config configs/demo.yaml [baselines.arms=[random]]
Departure from the papers: RQ-KMeans reads the same [text ; train co-engagement] vectors as ours, so that only the quantizer differs.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("baselines")
