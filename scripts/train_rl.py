"""Refine the item tokenizer's quantizer policy with reinforcement learning (stage `refine`).

Reads: the catalogue, `runs/<name>/train_tokenizer`, `runs/<name>/assign`, and the annotations those were made with.
Writes: `runs/<name>/refine`: `tokenizer/`, `sids/`, `reward/` (the Bradley-Terry `sid_reward`), `gate.json` (every figure before and
after, margins and where they come from, verdict), `log.jsonl` (one line per round; `refine.log_with` feeds a tracker too),
`moved.parquet` (which items moved, and the reward gained), `near_ties.json` (items whose codes another order of additions may turn:
several processes end with the codes of one but for these). An interrupted run continues at its last checkpoint.

    accelerate launch scripts/train_rl.py --config configs/demo.yaml
    accelerate launch --multi_gpu --num_processes 2 scripts/train_rl.py --config configs/demo.yaml refine.loop.rounds=10

Departures from the papers: UniSID (2602.10445) has no reinforcement; DeepInterestGR (2602.18907) applies it to the recommender, never
to the quantizer. Here the tokenizer's own weights are the policy; advantages are leave-one-out without division by the deviation (the
papers' bonus cancels under that division); the ratio is joint over a path's levels; KL is exact over the enumerated paths; negatives are
bounded as in OneRec-V2; a held-out figure of another kind than the reward ends the run; and a gate on held-out users decides whether
the result is kept.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("refine")
