"""One chat turn for a hub model: the model's chat template, a system prompt, template arguments, and the tokens of text and pictures.

Captions, interests, fine-tuning and the item tokenizer render and tokenize with this class, so that a model reads the same prompt in
all of them. Every row is tokenized alone and padded later (`mmsid.backbone.rows`): a row never depends on its batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from mmsid.errors import ConfigError

# Families that were never trained on chats: the prompt is the pictures followed by the text.
_PLAIN_PROCESSORS = ("PaliGemmaProcessor",)
# Chats of thinking models begin with an empty thought. A record has to follow at once; other templates ignore the argument.
TEMPLATE_ARGUMENTS: Mapping[str, Any] = {"enable_thinking": False}


class ChatFormat:
    """Renders and tokenizes conversations of one model.

    Args:
        processor: processor of a vision-language model, or text tokenizer.
        name: name of the model in messages.
        system_prompt: system message before the user's turn; "" for none.
        template_arguments: variables of the chat template, added to `TEMPLATE_ARGUMENTS`.

    Raises:
        ConfigError: the model has no chat template, or its template shows no system message or does not read an argument.
    """

    def __init__(self, processor: Any, name: str, *, system_prompt: str = "", template_arguments: Mapping[str, Any] | None = None) -> None:
        self.processor, self.name, self.system_prompt = processor, name, system_prompt
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reads_pictures = getattr(processor, "image_processor", None) is not None
        self.has_template = bool(getattr(processor, "chat_template", None) or self.tokenizer.chat_template)
        if not self.has_template and type(processor).__name__ not in _PLAIN_PROCESSORS:
            raise ConfigError(f"model {name!r} has no chat template; use an instruction-tuned model")
        self.template_arguments = self._known_arguments(template_arguments or {})
        controls = {*self.tokenizer.all_special_tokens, getattr(processor, "image_token", None), getattr(processor, "video_token", None)}
        controls = sorted((token for token in controls if token and len(token) > 1), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, controls))) if controls else None
        if system_prompt and system_prompt not in self.prompt("", 0):
            raise ConfigError(f"the chat template of model {name!r} shows no system message; remove system_prompt, or add it to the prompt")

    def prompt(self, text: str, pictures: int, *, answer_follows: bool = True) -> str:
        """The rendered turn of a user. With `answer_follows` it ends where the answer begins.

        Control tokens of the model inside `text` are broken up: they would end the turn or announce a picture that is not there.
        """
        text = self.without_controls(text)
        if not self.has_template:
            return self.processor.image_token * pictures + text
        return self._render([self._user(text, pictures)], answer_follows)

    def answer(self, text: str, pictures: int, answer: str) -> tuple[str, str]:
        """The prompt, and the answer with the tokens that end its turn.

        Raises:
            ConfigError: the template shows no turn of an assistant.
        """
        before, end = self.prompt(text, pictures), self.tokenizer.eos_token or ""
        if not self.has_template:
            return before, answer + end
        content: Any = [{"type": "text", "text": answer}] if self.reads_pictures else answer
        full = self._render([self._user(self.without_controls(text), pictures), {"role": "assistant", "content": content}], False)
        if full.startswith(before) and answer.strip() in full[len(before) :]:
            return before, full[len(before) :]
        if answer.strip() not in full.replace(text, "", 1):
            raise ConfigError(
                f"the chat template of model {self.name!r} shows no answer of an assistant, so nothing can be learnt; use a model whose "
                "template renders the role `assistant`"
            )
        return before, answer + end  # a template without a generation prompt, or one that drops an empty thought

    def without_controls(self, text: str) -> str:
        """The text with a zero-width space inside every control token of the model."""
        return text if self._controls is None else self._controls.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text)

    def tokens(self, prompt: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Model inputs of one rendered prompt: `input_ids` (1, T), further inputs per token, and pixels."""
        special = {} if self.reads_pictures and not self._begins(prompt) else {"add_special_tokens": False}
        if not self.reads_pictures:
            encoded = self.tokenizer(prompt, return_tensors="pt", **special)
        elif not pictures and not self.has_template:  # PaliGemma's processor refuses a prompt without a picture
            encoded = self.tokenizer(f"{self.tokenizer.bos_token}{prompt}\n", add_special_tokens=False, return_tensors="pt")
            encoded["token_type_ids"] = torch.zeros_like(encoded["input_ids"])
        else:
            encoded = self.processor(text=[prompt], images=[list(pictures)] if pictures else None, return_tensors="pt", **special)
            if not self.has_template:
                encoded["token_type_ids"] = torch.zeros_like(encoded["input_ids"])
        row = {key: value for key, value in encoded.items() if isinstance(value, Tensor) and key not in ("labels", "attention_mask")}
        if row["input_ids"].shape[1] == 0:
            raise ConfigError(f"the chat template of model {self.name!r} renders an empty prompt; use an instruction-tuned model")
        return row

    @property
    def pad_token(self) -> int:
        """Id of padding; the end token if the model has none."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id or 0

    def _known_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given arguments, and those of the defaults that this template reads."""
        template = str(getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template or "")
        known = {key for key in (*TEMPLATE_ARGUMENTS, *given) if re.search(rf"\b{re.escape(key)}\b", template)}
        if unknown := sorted(given.keys() - known):
            raise ConfigError(f"the chat template of model {self.name!r} reads no {', '.join(unknown)}; correct template_arguments")
        return {key: value for key, value in {**TEMPLATE_ARGUMENTS, **given}.items() if key in known}

    def _begins(self, prompt: str) -> bool:
        """True if the template has written the first token already (Gemma, Mistral); a second one would disturb the model."""
        return bool(self.tokenizer.bos_token) and prompt.startswith(self.tokenizer.bos_token)

    def _user(self, text: str, pictures: int) -> dict[str, Any]:
        if not self.reads_pictures:
            return {"role": "user", "content": text}
        return {"role": "user", "content": [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]}

    def _render(self, turns: list[dict[str, Any]], answer_follows: bool) -> str:
        if self.system_prompt:
            content: Any = [{"type": "text", "text": self.system_prompt}] if self.reads_pictures else self.system_prompt
            turns = [{"role": "system", "content": content}, *turns]
        try:
            return self.processor.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer_follows, **self.template_arguments
            )
        except (TemplateError, TypeError) as error:
            raise ConfigError(f"the chat template of model {self.name!r} refuses the conversation: {error}") from error
