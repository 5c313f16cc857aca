"""Train a small vision-language model (or LoRA adapters on a hub model) to caption pictures. An interrupted run resumes.

Reads: the catalogue of the configuration, or draws demo cards. Writes: `runs/<name>/train_captioner/`, a model folder that
`AutoProcessor` and `AutoModelForImageTextToText` load, with measured.json (field accuracy on held-out and seen pictures).
Command: accelerate launch scripts/train_captioner.py --config configs/captioner_demo.yaml [train_captioner.joint.steps=1000]
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("train_captioner")
