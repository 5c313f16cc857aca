"""Generative recommenders over Semantic IDs, constrained decoding, item-level ranking metrics, classical baselines."""
