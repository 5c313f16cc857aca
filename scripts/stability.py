"""Flip rates: which codes change when captions lose words, or pictures are saved at another quality or cropped.

Reads: `runs/<name>/train_tokenizer/`, the catalogue and its annotations. Writes: `runs/<name>/stability/`.
Command: python scripts/stability.py --config configs/demo.yaml [stability.max_items=100]
Not in the papers: UniSID and DeepInterestGR report no stability of their codes.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("stability")
