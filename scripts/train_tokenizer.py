"""Train the item tokenizer: start from balanced fused codes, then distil, contrast and reconstruct.

Reads: the catalogue named in the configuration, `runs/<name>/caption/`, `runs/<name>/interests/`. Writes: `runs/<name>/train_tokenizer/`.
Command: accelerate launch [--multi_gpu --num_processes 2] scripts/train_tokenizer.py --config configs/demo.yaml [train_tokenizer.steps=100]
Departures from the UniSID paper (arXiv 2602.10445), all undone by `train_tokenizer.loss=unisid`: residual instead of parallel
heads, a start from balanced residual codes of [content ; train co-engagement] and cross-entropy to them, co-engaged items as
partners and finest positives.
Departures that stay: LoRA instead of full tuning, a small self-trained decoder where `train_tokenizer.decoder` names no language
model, and MiniLM over captions as the default backbone instead of Qwen2.5-VL-3B.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("train_tokenizer")
