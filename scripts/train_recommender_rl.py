"""Move the flat recommender by reinforcement (GRPO) after a supervised start, and rank both (stage `train_recommender_rl`).

Reads:  the catalogue and its sequences, a SID folder, `runs/<name>/text_quality/` where there is one.
Writes: runs/<name>/train_recommender_rl/ with metrics.json, ranking.md, models/, logs/ and the ranks of every user.
Run:    accelerate launch scripts/train_recommender_rl.py --config configs/demo_quality.yaml [train_recommender_rl.seeds=[0,1,2]]

Departures from DeepInterestGR (arXiv 2604.20861): a small causal model over SID tokens alone instead of a 7B language model with LoRA;
rollouts and log-probabilities are confined to existing SIDs; advantages are not divided by the group's deviation, which would cancel
the text quality, but weighted by it. The published normalisation is the second arm.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("train_recommender_rl")
