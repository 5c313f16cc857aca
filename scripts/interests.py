"""Mine the deep interests behind every item (DCIM), with a language model or from co-engagement.

Reads: the catalogue named in the configuration, `prompts/`, `runs/<name>/caption/`, the model. Writes: `runs/<name>/interests/`.
Command: python scripts/interests.py --config configs/demo.yaml [interests.generator=coengagement]
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("interests")
