"""Generative recommenders over Semantic IDs, trie-constrained decoding, ranking metrics and classical baselines."""
