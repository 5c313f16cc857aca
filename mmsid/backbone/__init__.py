"""Encoders: text encoder, vision-language model, query tokens, LoRA, and plain embeddings for baselines."""
