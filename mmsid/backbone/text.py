"""Text backbones: the packaged MiniLM (no download), or any Hugging Face text encoder or causal model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from mmsid.backbone.devices import torch_device
from mmsid.backbone.loading_bar import no_loading_bar
from mmsid.backbone.model_loading import Dtype, resolve_dtype
from mmsid.backbone.packaged_weights import MINILM, resolve
from mmsid.backbone.query_tokens import BackboneInput, Batch, QueryBackbone
from mmsid.backbone.weight_files import check_weight_files
from mmsid.errors import ConfigError

_OFFSET_BY_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}  # position ids start at padding_idx + 1


def hidden_size_of(path: str) -> int:
    """Hidden size H of a backbone, read from its configuration.

    Raises:
        ConfigError: no model configuration at `path`.
    """
    try:
        config = AutoConfig.from_pretrained(resolve(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone {path!r} has no readable configuration ({error}); use a folder, a hub id or `minilm`") from error
    return (config.get_text_config() if hasattr(config, "get_text_config") else config).hidden_size


class TextBackbone(QueryBackbone):
    """Query backbone that encodes `item.text`, truncated to `max_length` tokens. Pictures are ignored.

    Args:
        path: "minilm", or a folder or hub id of an encoder (BERT, MPNet, ...) or a causal model (Qwen, Llama, ...).
        max_length: maximum number of content tokens; content and query tokens must fit the positions of the model.
        dtype: number format of the weights, see `mmsid.backbone.model_loading.resolve_dtype`.

    Raises:
        ConfigError: the model cannot be loaded, or `max_length` is too large.
    """

    look_ahead = 64

    def __init__(self, path: str = MINILM, *, num_levels: int = 3, max_length: int = 128, dtype: Dtype = "auto", seed: int = 0) -> None:
        folder = resolve(path)
        check_weight_files(folder)
        try:
            text_tokenizer = AutoTokenizer.from_pretrained(folder)
            with no_loading_bar():
                model = AutoModel.from_pretrained(folder, dtype=resolve_dtype(dtype, folder, torch_device()))
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"backbone {path!r} cannot be loaded as a text model ({error}); use a folder, a hub id or `minilm`"
            ) from error
        seed_token = next((t for t in (text_tokenizer.cls_token_id, text_tokenizer.eos_token_id) if t is not None), 0)
        pad_token = text_tokenizer.pad_token_id if text_tokenizer.pad_token_id is not None else seed_token
        offset = pad_token + 1 if model.config.model_type in _OFFSET_BY_PADDING else 0
        super().__init__(model, num_levels=num_levels, seed_token=seed_token, pad_token=pad_token, seed=seed, position_offset=offset)
        limit = self.max_positions - self.num_queries - offset
        if max_length > limit:
            raise ConfigError(f"max_length is {max_length}, but {path!r} has positions for {limit} content tokens; lower max_length")
        self.path, self.text_tokenizer, self.max_length = path, text_tokenizer, max_length
        model.requires_grad_(False)

    def text_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """Tokenizer of the texts, and the number of tokens that are read of one, special tokens not counted."""
        return self.text_tokenizer, self.max_length - self.text_tokenizer.num_special_tokens_to_add()

    def tokens(self, item: BackboneInput) -> Batch:
        """Token ids of the text, (1, T), special tokens included; an empty text gives at least one token."""
        return self.tokens_of([item])[0]

    def tokens_of(self, items: Sequence[BackboneInput]) -> list[Batch]:
        """`tokens` of several items in one tokenizer call, because the call overhead exceeds the time for one title."""
        rows = self.text_tokenizer([item.text for item in items], truncation=True, max_length=self.max_length)["input_ids"] if items else []
        if not all(rows):
            fallback = self.text_tokenizer(self.text_tokenizer.decode([self.seed_token]), add_special_tokens=False)["input_ids"]
            rows = [row or fallback for row in rows]
        return [{"input_ids": torch.tensor([row], dtype=torch.int64)} for row in rows]
