"""Train a reward model: `--part text` (stage `text_quality`) scores mined descriptors, `--part sid` (stage `sid_reward`) scores codes.

text reads the catalogue, `runs/<name>/interests/`, `caption/`, and `judge/` or the known facts of the demo catalogue. It writes
`runs/<name>/text_quality/`: q per descriptor and per item, the model, held-out accuracy and calibration.
sid reads the catalogue, `runs/<name>/train_tokenizer/` and `assign/`, with the keys of `sid_reward:` or else of `refine:`. It writes
`runs/<name>/sid_reward/`: the model and its held-out report, for inspection only, because `train_rl.py` fits its own model.
Command: accelerate launch scripts/train_reward.py --part text --config configs/demo_recommender_rl.yaml
Differences from DeepInterestGR (arXiv 2604.20861): there a judge labels every descriptor. Here a small model learns from some labels,
scores all descriptors, and is not published if its held-out accuracy is too low. The paper has no reward for codes.
"""

import argparse

from mmsid.cli import main_stage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a reward model. Other arguments are passed to the stage.")
    parser.add_argument("--part", choices=("text", "sid"), required=True, help="text: stage text_quality; sid: stage sid_reward")
    known, rest = parser.parse_known_args()
    main_stage({"text": "text_quality", "sid": "sid_reward"}[known.part], rest)
