"""Give every item its Semantic ID with a trained tokenizer.

Reads: `runs/<name>/train_tokenizer/`, the catalogue and its annotations. Writes: `runs/<name>/assign/` (a SID folder).
Command: python scripts/assign.py --config configs/demo.yaml [assign.collisions=suffix]
With `--append runs/<earlier>/assign`, items of that folder keep their Semantic IDs and only new items get one.
Departure from UniSID (arXiv 2602.10445): the paper keeps collisions; the default here relocates colliding items.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("assign")
