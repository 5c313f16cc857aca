"""`accelerate launch scripts/train_captioner.py --config configs/captioner_demo.yaml`: the small VLM, or LoRA on a hub VLM."""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("train_captioner")
