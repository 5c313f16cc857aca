"""Train the recommender on every SID table of a run and rank the full catalogue.

Reads:  the catalogue and its sequences, sids.parquet of each variant.
Writes: runs/<name>/train_recommender/ with metrics.json, ranking.md and the ranks of every user.
Run:    accelerate launch scripts/train_recommender.py --config configs/demo.yaml
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("train_recommender")
