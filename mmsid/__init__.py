"""mmsid: Semantic IDs for multimodal ads and products, from raw pictures to a measured ranking."""

__version__ = "0.1.0"
