"""Hugging Face models in process: any image-text-to-text model, or a text model for text-only prompts.

`demo` names the weights shipped with mmsid; they are loaded through the same classes as any hub model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmsid.annotate.generator import GenerationFailure, Request
from mmsid.annotate.units import DEMO
from mmsid.artifacts import file_sha256, sha256
from mmsid.backbone.text import no_loading_bar
from mmsid.errors import ConfigError

_DEMO_FOLDER = Path(__file__).parent / "weights" / "demo_captioner"
_FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_SETTINGS = ("*config.json", "*token*.json", "vocab*", "merges.txt", "chat_template*", "*.jinja", "*.model")  # what can change an answer


def demo_weights() -> Path:
    """Folder of the shipped weights. Raises ConfigError when this installation lacks them."""
    if not (_DEMO_FOLDER / "config.json").is_file():
        raise ConfigError(f"no demo captioner at {_DEMO_FOLDER}; train one (scripts/train_captioner.py) or name another model")
    return _DEMO_FOLDER


class HuggingFaceGenerator:
    """Greedy (or seeded) batched generation with left padding.

    A request's answer does not depend on what shares its batch: greedy decoding is padded on the left under a mask, and a
    drawn answer takes its noise from its own seed (Gumbel-max), not from a generator shared by the batch.
    `model_id` is the model's name and the first 12 hex digits of the hash of its safetensors.

    Args:
        name: `demo`, a local folder (a finished `train_captioner` folder, too), or a hub id (offline: from the local cache).
        dtype: number format of the weights: `auto` (as stored), `float32`, `bfloat16`, `float16`.
        device: `auto` = cuda when there is one.

    Raises:
        ConfigError: the model cannot be found, has no safetensors, or is of no supported kind.
    """

    def __init__(
        self, name: str | Path, *, revision: str | None = None, dtype: str = "float32", device: str = "auto", max_new_tokens: int = 256
    ) -> None:
        self.name, self.dtype, self.max_new_tokens = str(name), dtype, max_new_tokens
        folder = _locate(self.name, revision)
        self.model_id = f"{_short_name(self.name)}@{_files_sha256(folder, ('*.safetensors',))[:12]}"
        self._settings_sha256 = _files_sha256(folder, _SETTINGS)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        try:
            kind = AutoConfig.from_pretrained(folder).model_type
            self.reads_pictures = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            model_class = AutoModelForImageTextToText if self.reads_pictures else AutoModelForCausalLM
            self.processor = (AutoProcessor if self.reads_pictures else AutoTokenizer).from_pretrained(folder)
            wanted = dtype if dtype == "auto" else getattr(torch, dtype)
            with no_loading_bar():
                model = model_class.from_pretrained(folder, dtype=wanted, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"model {name!r} in {folder} cannot be loaded: {error}") from error
        for weight_name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ConfigError(f"model {name!r} in {folder}: {weight_name} holds NaN or infinite values; copy the model anew")
        self.model = model.to(self.device).eval()
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not getattr(self.processor, "chat_template", None) and not self.tokenizer.chat_template:
            raise ConfigError(f"model {name!r} has no chat template; use an instruction-tuned model")

    @property
    def parameters(self) -> dict[str, Any]:
        """Part of the cache key: token limit, number format, and the hash of tokenizer, processor and template files."""
        return {"max_new_tokens": self.max_new_tokens, "dtype": self.dtype, "settings_sha256": self._settings_sha256}

    def generate(self, requests: list[Request]) -> list[str | GenerationFailure]:
        """Answer in order. Requests with unlike numbers of pictures go in separate batches.

        A batch too large for the device's memory is halved; a single request that does not fit is a failure `out_of_memory`.
        Raises ConfigError when a text-only model is handed pictures.
        """
        answers: list[str | GenerationFailure] = [""] * len(requests)
        groups: dict[tuple[int, bool], list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault((len(request.pictures), request.temperature > 0), []).append(at)
        for group in groups.values():
            for at, answer in zip(group, self._fitting([requests[at] for at in group])):
                answers[at] = answer
        return answers

    def _fitting(self, requests: list[Request]) -> list[str | GenerationFailure]:
        try:
            return list(self._batch(requests))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        if len(requests) == 1:
            return [GenerationFailure("out_of_memory", "one request alone exceeds the device's memory; lower max_side or max_new_tokens")]
        half = len(requests) // 2
        return self._fitting(requests[:half]) + self._fitting(requests[half:])

    @torch.inference_mode()
    def _batch(self, requests: list[Request]) -> list[str]:
        if requests[0].pictures and not self.reads_pictures:
            raise ConfigError(f"model {self.name!r} reads text only but was given pictures; set pictures: false or name a vision model")
        chats = [[{"role": "user", "content": self._content(request)}] for request in requests]
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        if self.reads_pictures:
            options["processor_kwargs"] = {"padding": True}
        else:
            options["padding"] = True
        inputs = self.processor.apply_chat_template(chats, **options)
        inputs.pop("labels", None)  # PaliGemma's processor returns them even when nothing is trained
        inputs = {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        noise = LogitsProcessorList([SeededGumbel(requests)]) if requests[0].temperature > 0 else None
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=noise,
        )
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _content(self, request: Request) -> Any:
        if not self.reads_pictures:
            return request.prompt
        pictures = [{"type": "image", "image": picture} for picture in request.pictures]
        return [*pictures, {"type": "text", "text": request.prompt}]


class SeededGumbel(LogitsProcessor):
    """Turns greedy decoding into sampling: argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T).

    Every row has a generator of its own (seeded by its request), so a draw is the same alone and in any batch.
    """

    def __init__(self, requests: list[Request]) -> None:
        self._temperatures = torch.tensor([request.temperature for request in requests])
        self._generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores (B, V) -> noisy scores (B, V)."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self._generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
        return scores / self._temperatures.to(scores.device)[:, None] + gumbel.to(scores.device, scores.dtype)


def _locate(name: str, revision: str | None) -> Path:
    """The folder that holds the model, without code or pickles: only safetensors and plain settings are ever fetched."""
    if name == DEMO:
        return demo_weights()
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")):
            raise ConfigError(f"model folder {name} does not exist; correct the path, or run the stage that writes it first")
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_FETCHED)))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {name!r} is neither a folder nor to be had from the hub ({type(error).__name__}); download it first, or use `demo`"
            ) from error
    elif not (folder / "config.json").is_file():  # a stage's folder: the model lies one below its manifest
        inner = sorted(found.parent for found in folder.glob("*/config.json"))
        folder = inner[0] if len(inner) == 1 else folder
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model {name!r}: no safetensors in {folder}; pickled weights are refused")
    return folder


def _short_name(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name


def _files_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return sha256([[path.name, file_sha256(path)] for path in files])
