"""Captions, interests and judged text quality: one job runner, several generators."""
