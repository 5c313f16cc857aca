"""Reinforce the flat recommender (GRPO) after supervised training, and rank both (stage `train_recommender_rl`).

Reads:  the catalogue and its sequences, a SID folder, and `runs/<name>/text_quality/` if it exists.
Writes: runs/<name>/train_recommender_rl/ with metrics.json, ranking.md, models/, logs/ and the ranks of every user.
Run:    accelerate launch scripts/train_recommender_rl.py --config configs/demo_recommender_rl.yaml [train_recommender_rl.seeds=[0,1,2]]

Departures from DeepInterestGR (arXiv 2604.20861): a small causal model over SID tokens instead of a 7B language model with
LoRA; rollouts and log-probabilities restricted to existing SIDs; advantages weighted by the text quality instead of divided
by the group's standard deviation, which would cancel it. The published normalisation is the variant `rl_published`.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("train_recommender_rl")
