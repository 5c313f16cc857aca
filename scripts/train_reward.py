"""Train a reward model: `--part text` scores mined descriptors (stage `text_quality`), `--part sid` scores codes (stage `sid_reward`).

Reads:  text: the catalogue, `runs/<name>/interests/`, `caption/`, and `judge/` or the truth of a drawn catalogue.
Writes: text: `runs/<name>/text_quality/`: q per descriptor and per item, the model, held-out accuracy and calibration.
Run:    accelerate launch scripts/train_reward.py --part text --config configs/demo_quality.yaml

Departure from DeepInterestGR (arXiv 2604.20861): there a judge labels every descriptor of the catalogue; here a small model learns from
some labels and scores the rest, and refuses to be used where it is no good.
"""

import sys

from mmsid.cli import main_stage

if __name__ == "__main__":
    pass
