"""Backbones of the item tokenizer: text encoders and vision-language models with query tokens, LoRA, and sentence embeddings."""
