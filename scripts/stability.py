"""Flip rates of codes when captions lose words, or pictures are compressed or cropped.

Reads: `runs/<name>/train_tokenizer/`, the catalogue and its annotations. Writes: `runs/<name>/stability/`.
Command: python scripts/stability.py --config configs/demo.yaml [stability.max_items=100]
Departure from the papers: UniSID and DeepInterestGR do not report the stability of their codes.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("stability")
