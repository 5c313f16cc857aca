"""Exports: Semantic IDs in the formats of the programs that train or serve generative recommenders. One file per consumer."""
