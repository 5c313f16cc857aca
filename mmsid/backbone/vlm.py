"""Vision-language backbones: any model that AutoModelForImageTextToText loads, with its own processor.

Tested on llava, paligemma, idefics3 and gemma3 models built from configurations and on the demo captioner. Qwen-VL needs torchvision
for its processor (extra `gpu`) and has not been measured. The vision tower is frozen; LoRA applies to the language part only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase

from mmsid.backbone.packaged_weights import resolve
from mmsid.backbone.query_tokens import BackboneInput, Batch, QueryBackbone
from mmsid.backbone.text import no_loading_bar
from mmsid.backbone.weight_files import check_weight_files
from mmsid.errors import ConfigError, PictureError

INSTRUCTION = "Given the following ad, generate its Semantic IDs and embedding."


def open_as_is(picture: Any) -> Any:
    """Default of `open_picture`: pictures are PIL images already."""
    return picture


class VlmBackbone(QueryBackbone):
    """Query backbone that encodes an instruction, the pictures of an item and its text in one chat turn.

    Args:
        path: folder or hub id of an image-text-to-text model, or `demo`, the packaged demo captioner.
        max_length: maximum number of text tokens per item; instruction and picture tokens are not counted.
        max_pictures: maximum number of pictures per item.
        open_picture: turns an entry of `item.pictures` into an RGB PIL image; pictures that raise a PictureError are skipped.
        instruction: text before the text of every item.

    Attributes:
        unread: items that were read without a picture although they have one, with the reason of the first such picture. A picture is
            skipped if it cannot be opened or if the processor raises an exception (for an extreme aspect ratio, for example).

    Raises:
        ConfigError: the model or its processor cannot be loaded.
    """

    def __init__(
        self,
        path: str,
        *,
        num_levels: int = 3,
        max_length: int = 128,
        max_pictures: int = 1,
        open_picture: Callable[[Any], Any] = open_as_is,
        instruction: str = INSTRUCTION,
        seed: int = 0,
    ) -> None:
        folder = resolve(path)
        check_weight_files(folder)
        try:
            processor = AutoProcessor.from_pretrained(folder)
            with no_loading_bar():
                model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").model
        except (OSError, ValueError, AttributeError, ImportError, SafetensorError) as error:
            raise ConfigError(
                f"backbone {path!r} cannot be loaded as a vision-language model ({error}); use the folder or hub id of an "
                "image-text-to-text model (Qwen-VL needs the extra `gpu`)"
            ) from error
        text_tokenizer = processor.tokenizer
        self._is_paligemma = model.config.model_type == "paligemma"
        seed_token = next((t for t in (text_tokenizer.eos_token_id, text_tokenizer.bos_token_id) if t is not None), 0)
        pad_token = text_tokenizer.pad_token_id if text_tokenizer.pad_token_id is not None else seed_token
        super().__init__(model, num_levels=num_levels, seed_token=seed_token, pad_token=pad_token, seed=seed)
        self.extra_fill = self.probe_fill()
        self.path, self.processor, self.max_length, self.max_pictures = path, processor, max_length, max_pictures
        self.open_picture, self.instruction = open_picture, instruction
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
            encoded = self._encoded(pictures, text)
        except Exception:  # processors raise untyped exceptions
            if not pictures:
                raise
            refused = [self._refusal(picture) for picture in pictures]
            reason = next((found for found in refused if found), "the processor refuses its pictures together")
            pictures = [picture for picture, found in zip(pictures, refused) if found is None] if any(refused) else []
            encoded = self._encoded(pictures, text)
        if item.pictures and not pictures and self.max_pictures > 0:
            self.unread.setdefault((item.text, *map(str, item.pictures)), reason)
        encoded.pop("labels", None)
        encoded.pop("attention_mask", None)  # `stack` makes one that includes the query tokens
        batch = {key: value for key, value in encoded.items() if isinstance(value, torch.Tensor)}
        if self._is_paligemma:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch

    def _encoded(self, pictures: list[Any], text: str) -> Any:
        """Processor outputs of one chat turn with these pictures."""
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
        if getattr(self.processor, "chat_template", None):
            prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=False)
        else:
            prompt = getattr(self.processor, "image_token", "<image>") * len(pictures) + text
        return self.processor(text=[prompt], images=[pictures] if pictures else None, return_tensors="pt")

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
