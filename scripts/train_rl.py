"""Refine the item tokenizer with reinforcement learning on users' behaviour (stage `refine`). An interrupted run resumes.

Reads: the catalogue, `runs/<name>/train_tokenizer/`, `runs/<name>/assign/` and the annotations that both were made with.
Writes: `runs/<name>/refine/` with tokenizer/, sids/, reward/, gate.json (metrics, margins, verdict), log.jsonl (one line per round),
moved.parquet (moved items, reward gained) and near_ties.json (items whose codes may change with the number of processes).
Command: accelerate launch [--multi_gpu --num_processes 2] scripts/train_rl.py --config configs/demo.yaml [refine.loop.rounds=10]
Differences from the papers: UniSID (2602.10445) has no reinforcement; DeepInterestGR (2602.18907) reinforces the recommender instead of
the quantizer. Advantages are leave-one-out without division by the deviation, which would cancel the quality bonus; ratios are joint over
the levels of a path; the KL is exact over enumerated paths; negative advantages are bounded as in OneRec-V2 (2508.20900).
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("refine")
