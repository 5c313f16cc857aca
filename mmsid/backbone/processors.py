"""Processors of hub models: text tokenizer and image processor, without the video processor, on PIL.

transformers loads the video processors of Qwen-VL, SmolVLM, LLaVA-OneVision and InternVL with torchvision, which does not work beside
every build of torch. mmsid reads pictures only. The processors are therefore loaded without their video part, and pictures are resized
by PIL, so that a picture becomes the same numbers on every machine, whether torchvision is installed or not.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from mmsid.errors import ConfigError

_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json")


def load_processor(folder: str | Path, name: str = "") -> Any:
    """The processor of a model folder; the text tokenizer of a model that reads text only.

    Args:
        name: name of the model in messages.

    Raises:
        ConfigError: a file is missing or damaged, or a package that this processor needs is not installed.
    """
    name = name or str(folder)
    try:
        model_type = AutoConfig.from_pretrained(folder).model_type
        processor_class = _processor_class(Path(folder), model_type)
        if processor_class is None:
            return load_tokenizer(folder, name)
        parts = set(processor_class.get_attributes())
        if "image_processor" not in parts or parts - {"image_processor", "tokenizer", "video_processor"}:
            return AutoProcessor.from_pretrained(folder)
        return _images_only(processor_class).from_pretrained(folder)
    except ImportError as error:
        raise ConfigError(f"the processor of model {name!r} needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"the processor of model {name!r} in {folder} cannot be loaded: {_first_line(error)}") from error


def load_tokenizer(folder: str | Path, name: str = "") -> Any:
    """The text tokenizer of a model folder.

    Raises:
        ConfigError: a file is missing or damaged, or a package that it needs is not installed.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise ConfigError(f"the tokenizer of model {name or str(folder)!r} in {folder} cannot be loaded: {_first_line(error)}") from error


def _processor_class(folder: Path, model_type: str) -> type | None:
    """The class that the model's files name, or that transformers has for this family; None for a text model."""
    for file in _NAMED_IN:
        path = folder / file
        if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")).get("processor_class")):
            return _class_named(found)
    known = PROCESSOR_MAPPING_NAMES.get(model_type)
    return None if known is None else _class_named(known)


def _class_named(name: str) -> type | None:
    """A processor class of transformers. Pixtral's module imports a function of the torchvision backend, which the PIL module has too."""
    if name != "PixtralProcessor" or is_torchvision_available():
        return getattr(transformers, name, None)
    family = "transformers.models.pixtral"
    torchvision_module = f"{family}.image_processing_pixtral"
    sys.modules.setdefault(torchvision_module, importlib.import_module(f"{family}.image_processing_pil_pixtral"))
    try:
        return importlib.import_module(f"{family}.processing_pixtral").PixtralProcessor
    finally:
        sys.modules.pop(torchvision_module, None)


def _images_only(processor_class: type) -> type:
    """A subclass that is loaded without a video processor and with the PIL image processor."""

    class ImagesOnly(processor_class):  # type: ignore[misc, valid-type]
        def __init__(self, image_processor: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
            if "video_processor" in processor_class.get_attributes():
                kwargs["video_processor"] = None
            super().__init__(image_processor, tokenizer, *args, **kwargs)
            # SmolVLM's chat template reads the frame rate of a video processor even if there is no video
            self.__dict__.setdefault("video_processor", SimpleNamespace(num_frames=None, fps=None))

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument_name == "image_processor" else super().check_argument_for_proper_class(argument_name, argument)

        @classmethod
        def _get_arguments_from_pretrained(cls, folder: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
            loaders = {"image_processor": _pil_image_processor, "tokenizer": AutoTokenizer.from_pretrained}
            return [loaders[name](folder) for name in cls.get_attributes() if name in loaders]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            known = _parameters(processor_class)
            processor = cls(*args, **{key: value for key, value in processor_dict.items() if key in known})
            processor.chat_template = processor.chat_template or processor_dict.get("chat_template")
            return processor

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = processor_class.__name__
    return ImagesOnly


def _parameters(processor_class: type) -> set[str]:
    """Arguments of the constructor besides the parts of the processor."""
    code = processor_class.__init__.__code__
    return set(code.co_varnames[1 : code.co_argcount]) - set(processor_class.get_attributes())


def _pil_image_processor(folder: Any) -> Any:
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
