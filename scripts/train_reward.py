"""Train a reward model: `--part text` (stage `text_quality`) scores mined descriptors, `--part sid` (stage `sid_reward`) scores codes.

Reads:  text: the catalogue, `runs/<name>/interests/`, `caption/`, and `judge/` or the truth of a drawn catalogue.
        sid: the catalogue, `runs/<name>/train_tokenizer/`, `assign/`; settings from `sid_reward:`, or else from `refine:`.
Writes: text: `runs/<name>/text_quality/`: q per descriptor and per item, the model, held-out accuracy and calibration.
        sid: `runs/<name>/sid_reward/`: the model and its held-out report. `train_rl.py` fits its own, so this is for looking.
Run:    accelerate launch scripts/train_reward.py --part text --config configs/demo_quality.yaml

Departure from DeepInterestGR (arXiv 2604.20861): there a judge labels every descriptor of the catalogue; here a small model learns from
some labels and scores all, and refuses to be used where it is no good. It has no reward for codes.
"""

import argparse

from mmsid.cli import main_stage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a reward model; all other arguments are those of the stage.")
    parser.add_argument("--part", choices=("text", "sid"), required=True, help="text: stage text_quality, sid: stage sid_reward")
    known, rest = parser.parse_known_args()
    main_stage({"text": "text_quality", "sid": "sid_reward"}[known.part], rest)
