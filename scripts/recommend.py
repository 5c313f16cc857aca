"""Recommend items to all users with the recommender of a run.

Reads:  `runs/<name>/train_recommender/recommender/`, the SID folder it was trained on, and the catalogue or a table of users.
Writes: `runs/<name>/recommend/recommendations/part-*.parquet` (one row per user), `problems.parquet` (rows that cannot be used).
Run:    python scripts/recommend.py --config configs/demo.yaml [--users FILE] [--k 100]
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("recommend")
