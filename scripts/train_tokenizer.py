"""Train the item tokenizer: closed-form initialization from balanced fused codes, then distillation, contrast and reconstruction.

Reads: the catalogue of the configuration, `runs/<name>/caption/`, `runs/<name>/interests/`. Writes: `runs/<name>/train_tokenizer/`.
Command: accelerate launch [--multi_gpu --num_processes 2] scripts/train_tokenizer.py --config configs/demo.yaml [train_tokenizer.steps=100]
Departures from UniSID (arXiv 2602.10445) that `train_tokenizer.loss=unisid` removes: a residual head, balanced residual codes of
[content ; train co-engagement] as initialization and as targets of a cross-entropy, co-engaged items as partners and finest positives.
Remaining departures: LoRA instead of full tuning, a small decoder trained on the summaries unless `train_tokenizer.decoder` names a
language model, and MiniLM over captions as the default backbone instead of Qwen2.5-VL-3B.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("train_tokenizer")
