"""Caption every ad picture with a vision-language model (CMSA).

Reads: the catalogue named in the configuration, `prompts/`, the model. Writes: `runs/<name>/caption/`.
Command: python scripts/caption.py --config configs/demo.yaml [caption.batch_size=32]
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("caption")
