"""Vision-language backbones: any model that AutoModelForImageTextToText loads, with its own processor.

The families that the tests cover stand in `mmsid.backbone.model_loading`. The vision tower is frozen; LoRA applies to the language part
only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerBase

from mmsid.backbone.chat import ChatFormat
from mmsid.backbone.devices import torch_device
from mmsid.backbone.model_files import locate_model
from mmsid.backbone.model_loading import Dtype, load_weights, resolve_dtype, warn_if_untested
from mmsid.backbone.picture_budget import PictureBudget
from mmsid.backbone.processors import load_processor
from mmsid.backbone.query_tokens import BackboneInput, Batch, QueryBackbone
from mmsid.errors import ConfigError, PictureError

INSTRUCTION = "Given the following ad, generate its Semantic IDs and embedding."
PICTURE_TOKENS = 256


def open_as_is(picture: Any) -> Any:
    """Default of `open_picture`: pictures are PIL images already."""
    return picture


class VlmBackbone(QueryBackbone):
    """Query backbone that encodes an instruction, the pictures of an item and its text in one chat turn.

    Args:
        path: folder or hub id of an image-text-to-text model, or `demo`, the packaged demo captioner.
        max_length: maximum number of text tokens per item; instruction and picture tokens are not counted.
        max_pictures: maximum number of pictures per item.
        picture_tokens: largest number of tokens per picture. None: 256, or the least that this family can do. A photograph of 3,000 x
            2,000 pixels would otherwise cost thousands of tokens.
        open_picture: turns an entry of `item.pictures` into an RGB PIL image; pictures that raise a PictureError are skipped.
        instruction: text before the text of every item.
        dtype: number format of the weights, see `mmsid.backbone.model_loading.resolve_dtype`.

    Attributes:
        unread: items that were read without a picture although they have one, with the reason of the first such picture. A picture is
            skipped if it cannot be opened or if the processor raises an exception (for an extreme aspect ratio, for example).

    Raises:
        ConfigError: the model or its processor cannot be loaded, the family has no single row of tokens for text and pictures, or it
            cannot keep to `picture_tokens`.
    """

    def __init__(
        self,
        path: str,
        *,
        num_levels: int = 3,
        max_length: int = 128,
        max_pictures: int = 1,
        picture_tokens: int | None = None,
        open_picture: Callable[[Any], Any] = open_as_is,
        instruction: str = INSTRUCTION,
        dtype: Dtype = "auto",
        seed: int = 0,
    ) -> None:
        folder = locate_model(path)
        model_type = _check_family(folder, path)
        processor = load_processor(folder, path)
        budget = PictureBudget(processor, picture_tokens or PICTURE_TOKENS, strict=picture_tokens is not None, name=path)
        chat = ChatFormat(processor, path)
        number_format = resolve_dtype(dtype, folder, torch_device())
        model = load_weights(AutoModelForImageTextToText, folder, path, number_format, "backbone").model
        warn_if_untested(model_type, path)
        self._is_paligemma = model_type == "paligemma"
        text_tokenizer = processor.tokenizer
        seed_token = next((t for t in (text_tokenizer.eos_token_id, text_tokenizer.bos_token_id) if t is not None), 0)
        super().__init__(model, num_levels=num_levels, seed_token=seed_token, pad_token=chat.pad_token, seed=seed)
        self.extra_fill = self.probe_fill()
        self.path, self.processor, self.max_length, self.max_pictures = path, processor, max_length, max_pictures
        self.open_picture, self.instruction, self.budget, self.chat = open_picture, instruction, budget, chat
        self.unread: dict[tuple[str, ...], str] = {}
        model.requires_grad_(False)

    def probe_fill(self) -> dict[str, int]:
        """PaliGemma attends to tokens of type 0 in both directions and to tokens of type 1 causally; other models need no extra input."""
        return {"token_type_ids": 1} if self._is_paligemma else {}

    def tokens(self, item: BackboneInput) -> Batch:
        """Processor outputs of one chat turn: ids (1, T), token types, pixel values. Unreadable pictures are left out (`unread`)."""
        text = "\n".join(part for part in (self.instruction, self._truncate(item.text)) if part)
        pictures, reason = self._open(item)
        try:
            batch = self._encoded(pictures, text)
        except Exception:  # processors raise untyped exceptions
            if not pictures:
                raise
            refused = [self._refusal(picture) for picture in pictures]
            reason = next((found for found in refused if found), "the processor refuses its pictures together")
            pictures = [picture for picture, found in zip(pictures, refused) if found is None] if any(refused) else []
            batch = self._encoded(pictures, text)
        if item.pictures and not pictures and self.max_pictures > 0:
            self.unread.setdefault((item.text, *map(str, item.pictures)), reason)
        return batch

    def _encoded(self, pictures: list[Any], text: str) -> Batch:
        """Processor outputs of one chat turn with these pictures."""
        prompt = self.chat.prompt(text, len(pictures), answer_follows=False)
        return self.chat.tokens(prompt, [self.budget.fit(picture) for picture in pictures])

    def _refusal(self, picture: Any) -> str | None:
        """Why the processor cannot read this picture alone; None if it can."""
        try:
            self._encoded([picture], self.instruction)
        except Exception as error:  # processors raise untyped exceptions
            return f"{type(error).__name__}: {error}"
        return None

    def _open(self, item: BackboneInput) -> tuple[list[Any], str]:
        """The first `max_pictures` pictures of an item that can be opened, and why the first of the others cannot ("" if all can)."""
        opened, reason = [], ""
        for picture in item.pictures:
            if len(opened) == self.max_pictures:
                break
            try:
                opened.append(self.open_picture(picture))
            except PictureError as error:
                reason = reason or f"the picture cannot be opened ({error.reason})"
        return opened, reason

    def text_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """Tokenizer of the texts, and the number of tokens that are read of one, special tokens not counted."""
        return self.processor.tokenizer, self.max_length

    def _truncate(self, text: str) -> str:
        offsets = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= self.max_length else text[: offsets[self.max_length - 1][1]]


def _check_family(folder: Any, path: str) -> str:
    """The family of the model.

    Raises:
        ConfigError: it is no vision-language model, or reads pictures outside the row of tokens.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone {path!r} cannot be loaded as a vision-language model ({error}); check the folder") from error
    text = config.get_text_config()
    if not hasattr(config, "vision_config") or config.is_encoder_decoder or getattr(text, "cross_attention_layers", None):
        why = "reads no pictures" if not hasattr(config, "vision_config") else "reads pictures by cross-attention, not as tokens of one row"
        raise ConfigError(
            f"backbone {path!r} is of the family {config.model_type!r}, which {why}; SID and EMB tokens need a decoder such as Qwen3-VL, "
            "SmolVLM, InternVL or Gemma 3"
        )
    return config.model_type
