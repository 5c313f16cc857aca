"""Captions, interests, judgements and text quality: annotation stages with a common job runner and several generators."""
