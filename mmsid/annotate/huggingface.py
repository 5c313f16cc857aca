"""Generator of Hugging Face models in this process: image-text-to-text models, or text models for text-only prompts.

`demo` names the weights shipped with mmsid, which are loaded with the same classes as any hub model.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LogitsProcessorList, StoppingCriteriaList
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmsid.annotate.decoding import AllDone, AnswerDecoder
from mmsid.annotate.generator import Answer, GenerationFailure, Request
from mmsid.annotate.gpu_limits import PICTURE_TOKENS, expected_rate, fitting_batch
from mmsid.annotate.prefix_cache import PrefixCache
from mmsid.annotate.structured_output import JsonConstraint, UnreadableTokenizerError
from mmsid.artifacts import file_sha256, sha256
from mmsid.backbone.chat import ChatFormat
from mmsid.backbone.devices import torch_device
from mmsid.backbone.model_files import locate_model
from mmsid.backbone.model_loading import Dtype, describe_model, load_weights, resolve_dtype, warn_if_untested
from mmsid.backbone.picture_budget import PictureBudget
from mmsid.backbone.processors import load_processor, load_tokenizer
from mmsid.backbone.rows import stack_rows
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import done

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
        dtype: number format of the weights, see `mmsid.backbone.model_loading.resolve_dtype`.
        device: as `mmsid.backbone.devices.torch_device`; looked up with the first request, on the machine that runs the model.
        max_new_tokens: longest answer.
        picture_tokens: largest number of tokens per picture; the model's own processor shrinks pictures accordingly. None: its default.
        system_prompt: system message before every prompt; "" for none.
        template_arguments: variables of the chat template, such as `enable_thinking`, which is False by default.
        schema: JSON schema of the answers. Every answer follows it and ends within `max_new_tokens`. None: free answers.

    Raises:
        ConfigError: the model cannot be found, has no whole safetensors, or is not supported; `max_new_tokens` is too small for the
            schema; its processor cannot keep to `picture_tokens`; its chat template shows no system message; this machine has no such
            device.
    """

    max_concurrent_calls = 2  # the inputs of one call are prepared while the model runs the other
    prepare_threads = min(8, max(1, (os.cpu_count() or 1) // 2))  # resizing a photograph takes longer than a GPU's caption of it

    def __init__(
        self,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: Dtype = "auto",
        device: str = "auto",
        max_new_tokens: int = 256,
        picture_tokens: int | None = None,
        system_prompt: str = "",
        template_arguments: dict[str, Any] | None = None,
        schema: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.revision, self.dtype, self.max_new_tokens = str(name), revision, dtype, max_new_tokens
        self.device, self.picture_tokens, self.schema = device, picture_tokens, schema
        self.system_prompt, self.template_arguments = system_prompt, dict(template_arguments or {})
        self.folder = locate_model(self.name, revision)
        self.model_id = f"{_short_name(self.name)}@{_files_sha256(self.folder, ('*.safetensors',))[:12]}"
        self._settings_sha256 = _files_sha256(self.folder, _SETTINGS)
        self._load_lock, self._model_lock = threading.Lock(), threading.Lock()
        self.prefix_cache = PrefixCache()
        self._fitting: int | None = None  # largest batch that has fitted the device's memory after an overflow

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
        """The model's processor (or text tokenizer), which keeps to the picture budget."""
        if not self.reads_pictures:
            return load_tokenizer(self.folder, self.name)
        return load_processor(self.folder, self.name)

    @functools.cached_property
    def budget(self) -> PictureBudget | None:
        """The budget of tokens per picture; None if there is none."""
        if self.picture_tokens is None:
            return None
        return PictureBudget(self.processor, self.picture_tokens, strict=True, name=self.name)

    @functools.cached_property
    def chat(self) -> ChatFormat:
        """The chat template with its system prompt and arguments."""
        return ChatFormat(self.processor, self.name, system_prompt=self.system_prompt, template_arguments=self.template_arguments)

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """The loaded model on the device, in evaluation mode."""
        _ = self.chat, self.budget  # their errors come before the weights are read
        device = torch_device(self.device)
        model_class = AutoModelForImageTextToText if self.reads_pictures else AutoModelForCausalLM
        model = load_weights(model_class, self.folder, self.name, resolve_dtype(self.dtype, self.folder, device))
        if self.reads_pictures:
            warn_if_untested(model.config.model_type, self.name)
        model = model.to(device).eval()
        self.__dict__["model"] = model  # the batch size counts its memory
        done(describe_model(model, self.name) + expected_rate(model, self._expected_picture_tokens, self.batch_size))
        return model

    @functools.cached_property
    def batch_size(self) -> int:
        """Requests per call that the job sends if its configuration names none: 16, on a GPU as many as its free memory should hold."""
        tokens = self._expected_picture_tokens + self.max_new_tokens
        return fitting_batch(self.folder, torch_device(self.device), tokens, loaded="model" in self.__dict__)

    @property
    def _expected_picture_tokens(self) -> int:
        return (self.picture_tokens or PICTURE_TOKENS) if self.reads_pictures else 0

    @functools.cached_property
    def constraint(self) -> JsonConstraint | None:
        """The constraint that holds answers to the schema; None without a schema, or if the tokenizer cannot be read (with a warning)."""
        if self.schema is None:
            return None
        try:
            return JsonConstraint(self.chat.tokenizer, self.schema, self.max_new_tokens)
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
        """Part of the cache key: token limit, dtype, schema, picture budget, chat settings, hash of the settings files."""
        settings = {
            "picture_tokens": self.picture_tokens,
            "system_prompt": self.system_prompt,
            "template_arguments": self.template_arguments,
        }
        given = {key: value for key, value in settings.items() if value}
        own = {"max_new_tokens": self.max_new_tokens, "dtype": self.dtype, "settings_sha256": self._settings_sha256}
        return {**own, **given, "json_schema": self.schema}

    def generate(self, requests: list[Request]) -> list[Answer | GenerationFailure]:
        """Answer requests in order. Requests with different numbers of pictures run in separate batches.

        A batch that exceeds the device's memory is halved, and later batches are cut to the size that has fitted. A batch that the
        processor or the model refuses is halved, too. A single request that exceeds the memory returns the failure `out_of_memory`, one
        that is refused (a picture of extreme shape) `model_refused`.

        Raises:
            ConfigError: a text-only model got pictures, or the model cannot be loaded.
        """
        with self._load_lock:
            _ = self.model, self.constraint  # loads it once, in whichever thread comes first
        answers: list[Answer | GenerationFailure] = [Answer("")] * len(requests)
        groups: dict[tuple[int, bool], list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault((len(request.pictures), request.temperature > 0), []).append(at)
        for group in groups.values():
            size = self._fitting or len(group)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                for at, answer in zip(part, self._generate_batch([requests[at] for at in part])):
                    answers[at] = answer
        return answers

    def _load_error(self, error: Exception) -> ConfigError:
        return ConfigError(f"model {self.name!r} in {self.folder} cannot be loaded: {error}")

    def _generate_batch(self, requests: list[Request]) -> list[Answer | GenerationFailure]:
        try:
            return list(self._generate_once(requests))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._fitting = max(1, min(len(requests) // 2, self._fitting or len(requests)))
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
        """Model inputs of requests: token ids of the chat template, attention mask, pixels. Requests are tokenized alone, then padded."""
        if self.prepare_threads == 1 or not any(request.pictures for request in requests):
            rows = [self._row(request) for request in requests]
        else:
            with ThreadPoolExecutor(self.prepare_threads) as pool:
                rows = list(pool.map(self._row, requests))
        return stack_rows(rows, self.chat.pad_token, left=True)

    def _row(self, request: Request) -> dict[str, torch.Tensor]:
        """Tokens and pixels of one request."""
        pictures = [picture if self.budget is None else self.budget.fit(picture) for picture in request.pictures]
        return self.chat.tokens(self.chat.prompt(request.prompt, len(pictures)), pictures)

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
            pad_token_id=self.chat.pad_token,
            logits_processor=LogitsProcessorList([decoder]),
            stopping_criteria=StoppingCriteriaList([AllDone(decoder)]),
        )
        return decoder.answers(self.chat.tokenizer)

    @property
    def _end_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return {token for token in (*listed, self.chat.tokenizer.eos_token_id) if token is not None}


class _RefusedError(Exception):
    """The processor or the model cannot read a request."""


def _short_name(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name


def _files_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return sha256([[path.name, file_sha256(path)] for path in files])
