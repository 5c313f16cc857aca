"""Generator of Hugging Face models in this process: image-text-to-text models, or text models for text-only prompts.

`demo` names the weights shipped with mmsid, which are loaded with the same classes as any hub model.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmsid.annotate.decoding import AllDone, AnswerDecoder
from mmsid.annotate.generator import Answer, GenerationFailure, Request
from mmsid.annotate.prefix_cache import PrefixCache
from mmsid.annotate.structured_output import JsonConstraint, UnreadableTokenizerError
from mmsid.artifacts import file_sha256, sha256
from mmsid.backbone.devices import torch_device
from mmsid.backbone.packaged_weights import DEMO, demo_weights
from mmsid.backbone.text import no_loading_bar
from mmsid.backbone.weight_files import check_weight_files
from mmsid.errors import ConfigError, MmsidError

_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
# files besides the weights that can change an answer
_SETTINGS = ("*config.json", "*token*.json", "vocab*", "merges.txt", "chat_template*", "*.jinja", "*.model")


class HuggingFaceGenerator:
    """Batched generation, greedy or sampled with a seed per request.

    An answer does not depend on the other requests of its batch: prompts are padded on the left under a mask, and sampling noise
    comes from the request's own seed (Gumbel-max trick). `model_id` is the model's name and the first 12 hex digits of the hash of
    its safetensors. The weights are loaded with the first request. Pickling stores the constructor's arguments only.

    Args:
        name: `demo`, a local folder (also a finished `train_captioner` folder), or a hub id (offline: from the local cache).
        revision: git revision of a hub model.
        dtype: number format of the weights: `auto` (as stored), `float32`, `bfloat16`, `float16`.
        device: as `mmsid.backbone.devices.torch_device`; looked up with the first request, on the machine that runs the model.
        max_new_tokens: longest answer.
        picture_tokens: largest number of tokens per picture; the model's own processor shrinks pictures accordingly. None: its default.
        system_prompt: instruction in the role `system`. template_arguments: variables for the chat template.
        schema: JSON schema of the answers. Every answer follows it and ends within `max_new_tokens`. None: free answers.

    Raises:
        ConfigError: the model cannot be found, has no whole safetensors, or is not supported; `max_new_tokens` is too small for the
            schema; `picture_tokens` is given, but the processor's token count does not depend on the picture's size; this machine has
            no such device.
    """

    max_concurrent_calls = 2  # the inputs of one call are prepared while the model runs the other

    def __init__(
        self,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        max_new_tokens: int = 256,
        picture_tokens: int | None = None,
        system_prompt: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        schema: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.revision, self.dtype, self.max_new_tokens = str(name), revision, dtype, max_new_tokens
        self.device, self.picture_tokens, self.schema = device, picture_tokens, schema
        self.system_prompt, self.template_arguments = system_prompt, dict(template_arguments or {})
        self.folder = _locate(self.name, revision)
        check_weight_files(self.folder)
        self.model_id = f"{_short_name(self.name)}@{_files_sha256(self.folder, ('*.safetensors',))[:12]}"
        self._settings_sha256 = _files_sha256(self.folder, _SETTINGS)
        self._load_lock, self._model_lock = threading.Lock(), threading.Lock()
        self.prefix_cache = PrefixCache()

    def __reduce__(self) -> tuple[Any, ...]:
        name = str(Path(self.name).absolute()) if Path(self.name).is_dir() else self.name
        options = {"revision": self.revision, "dtype": self.dtype, "device": self.device}
        options |= {"max_new_tokens": self.max_new_tokens, "picture_tokens": self.picture_tokens, "schema": self.schema}
        options |= {"system_prompt": self.system_prompt, "template_arguments": self.template_arguments}
        return functools.partial(HuggingFaceGenerator, **options), (name,)

    @functools.cached_property
    def reads_pictures(self) -> bool:
        """True for an image-text-to-text model, False for a text-only model."""
        try:
            return AutoConfig.from_pretrained(self.folder).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        except (OSError, ValueError) as error:
            raise self._load_error(error) from error

    @functools.cached_property
    def processor(self) -> Any:
        """The model's processor (or text tokenizer), with left padding."""
        try:
            processor = (AutoProcessor if self.reads_pictures else AutoTokenizer).from_pretrained(self.folder)
        except (OSError, ValueError, ImportError) as error:
            raise self._load_error(error) from error
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        if not template:
            raise ConfigError(f"model {self.name!r} has no chat template; use an instruction-tuned model")
        if unknown := [name for name in self.template_arguments if name not in str(template)]:
            raise ConfigError(f"template_arguments: the chat template of {self.name!r} reads no {', '.join(unknown)}; remove them")
        if self.picture_tokens is not None:
            limit_picture_tokens(getattr(processor, "image_processor", None), self.picture_tokens, self.name)
        return processor

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """The loaded model on the device, in evaluation mode."""
        model_class = AutoModelForImageTextToText if self.reads_pictures else AutoModelForCausalLM
        device = torch_device(self.device)
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        try:
            with no_loading_bar():
                model = model_class.from_pretrained(self.folder, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise self._load_error(error) from error
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ConfigError(f"model {self.name!r} in {self.folder}: {name} contains NaN or infinite values; copy the model again")
        return model.to(device).eval()

    @functools.cached_property
    def constraint(self) -> JsonConstraint | None:
        """The constraint that holds answers to the schema; None without a schema, or if the tokenizer cannot be read (with a warning)."""
        if self.schema is None:
            return None
        try:
            return JsonConstraint(self._text_tokenizer, self.schema, self.max_new_tokens)
        except UnreadableTokenizerError as error:
            warnings.warn(
                f"model {self.name!r}: llguidance cannot read its tokenizer ({error}), so its answers are not held to the JSON schema; "
                "expect more retries and quarantined rows",
                stacklevel=2,
            )
            return None
        except ValueError as error:
            raise ConfigError(f"model {self.name!r}: {error}; raise it") from error

    @property
    def constrained(self) -> bool:
        """Whether every answer is held to the schema."""
        return self.constraint is not None

    @property
    def parameters(self) -> dict[str, Any]:
        """Part of the cache key: token limit, dtype, schema, and the hash of tokenizer, processor and template files."""
        optional = {name: getattr(self, name) for name in ("picture_tokens", "system_prompt", "template_arguments")}
        own = {"max_new_tokens": self.max_new_tokens, "dtype": self.dtype, "settings_sha256": self._settings_sha256}
        return own | {name: value for name, value in optional.items() if value} | {"json_schema": self.schema}

    def generate(self, requests: list[Request]) -> list[Answer | GenerationFailure]:
        """Answer requests in order. Requests with different numbers of pictures run in separate batches.

        A batch that exceeds the device's memory, or that the processor or the model refuses, is halved. A single request that exceeds
        the memory returns the failure `out_of_memory`, one that is refused (a picture of extreme shape) `model_refused`.

        Raises:
            ConfigError: a text-only model got pictures, or the model cannot be loaded.
        """
        with self._load_lock:
            _ = self.processor, self.constraint, self.model  # loads them once, in whichever thread comes first
        answers: list[Answer | GenerationFailure] = [Answer("")] * len(requests)
        groups: dict[tuple[int, bool], list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault((len(request.pictures), request.temperature > 0), []).append(at)
        for group in groups.values():
            for at, answer in zip(group, self._generate_batch([requests[at] for at in group])):
                answers[at] = answer
        return answers

    def _load_error(self, error: Exception) -> ConfigError:
        return ConfigError(f"model {self.name!r} in {self.folder} cannot be loaded: {error}")

    def _generate_batch(self, requests: list[Request]) -> list[Answer | GenerationFailure]:
        try:
            return list(self._generate_once(requests))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            failure = GenerationFailure("out_of_memory", "a single request exceeds the device's memory; lower max_side or max_new_tokens")
        except _RefusedError as error:
            failure = GenerationFailure("model_refused", str(error))
        if len(requests) == 1:
            return [failure]
        half = len(requests) // 2
        return self._generate_batch(requests[:half]) + self._generate_batch(requests[half:])

    def _generate_once(self, requests: list[Request]) -> list[Answer]:
        if requests[0].pictures and not self.reads_pictures:
            raise ConfigError(f"model {self.name!r} reads text only but was given pictures; set pictures: false or name a vision model")
        try:
            inputs = self.inputs(requests)
        except (MmsidError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # processors raise untyped exceptions
            raise _RefusedError(f"the processor of {self.name!r} raises {type(error).__name__}: {error}") from error
        with self._model_lock:
            try:
                return self.decode(inputs, requests)
            except (ValueError, IndexError) as error:  # picture tokens that do not fit the picture's features, a prompt that is too long
                raise _RefusedError(f"the model {self.name!r} raises {type(error).__name__}: {error}") from error

    def inputs(self, requests: list[Request]) -> dict[str, torch.Tensor]:
        """Model inputs of requests with equal numbers of pictures: token ids of the chat template, attention mask, pixels."""
        chats = [[*self._system(), {"role": "user", "content": self._content(request)}] for request in requests]
        options: dict[str, Any] = dict(self.template_arguments)
        options |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        if self.reads_pictures:
            options["processor_kwargs"] = {"padding": True}
        else:
            options["padding"] = True
        inputs = self.processor.apply_chat_template(chats, **options)
        inputs.pop("labels", None)  # PaliGemma's processor returns labels for inference, too
        return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}

    @torch.inference_mode()
    def decode(self, inputs: dict[str, torch.Tensor], requests: list[Request]) -> list[Answer]:
        """The answers to model inputs of `requests`."""
        device, dtype = self.model.device, self.model.dtype
        inputs = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}
        if not self.reads_pictures:  # some vision models compute positions differently, so only text models use the prefix cache
            inputs = self.prefix_cache.apply(self.model, inputs)
        decoder = AnswerDecoder(requests, self.constraint, self._end_tokens)
        self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self._text_tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([decoder]),
            stopping_criteria=StoppingCriteriaList([AllDone(decoder)]),
        )
        return decoder.answers(self._text_tokenizer)

    @property
    def _end_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return {token for token in (*listed, self._text_tokenizer.eos_token_id) if token is not None}

    @property
    def _text_tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _system(self) -> list[dict[str, Any]]:
        if self.system_prompt is None:
            return []
        text = [{"type": "text", "text": self.system_prompt}] if self.reads_pictures else self.system_prompt
        return [{"role": "system", "content": text}]

    def _content(self, request: Request) -> Any:
        if not self.reads_pictures:
            return request.prompt
        pictures = [{"type": "image", "image": picture} for picture in request.pictures]
        return [*pictures, {"type": "text", "text": request.prompt}]


class _RefusedError(Exception):
    """The processor or the model cannot read a request."""


def _locate(name: str, revision: str | None) -> Path:
    """The model's folder. Only safetensors and configuration files are downloaded, never code or pickled weights."""
    if name == DEMO:
        return demo_weights()
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")):
            raise ConfigError(f"model folder {name} does not exist; correct the path, or run the stage that writes it first")
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOADED)))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {name!r} is neither a folder nor available from the hub ({type(error).__name__}); download it first, or use `demo`"
            ) from error
    elif not (folder / "config.json").is_file():  # an artefact folder: the model is in a subfolder beside the manifest
        inner = sorted(found.parent for found in folder.glob("*/config.json"))
        folder = inner[0] if len(inner) == 1 else folder
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model {name!r}: no safetensors in {folder}; pickled weights are refused, so convert the model to safetensors")
    return folder


def limit_picture_tokens(image_processor: Any, tokens: int, name: str) -> None:
    """Make `image_processor` shrink pictures to at most `tokens` tokens, which lowers the cost of a caption most.

    Qwen-VL processors use one token per (patch * merge) ** 2 pixels and at most `size["longest_edge"]` pixels per picture.

    Raises:
        ConfigError: the processor resizes every picture to one size.
    """
    patch, merge = getattr(image_processor, "patch_size", None), getattr(image_processor, "merge_size", None)
    size = getattr(image_processor, "size", None)
    if not isinstance(patch, int) or not isinstance(merge, int) or size is None or size["longest_edge"] is None:
        raise ConfigError(f"picture_tokens: the processor of {name!r} gives every picture the same number of tokens; remove the key")
    pixels = tokens * (patch * merge) ** 2
    image_processor.size = {"shortest_edge": min(pixels, size["shortest_edge"]), "longest_edge": pixels}
    for pixel_limit in ("min_pixels", "max_pixels"):  # older processors read these instead
        if getattr(image_processor, pixel_limit, None) is not None:
            setattr(image_processor, pixel_limit, min(pixels, getattr(image_processor, pixel_limit)))


def _short_name(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name


def _files_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return sha256([[path.name, file_sha256(path)] for path in files])
