"""The wheel carries what a user needs: prompts, example configurations, fonts, the shipped captioner."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_carries_prompts_configs_fonts_and_weights(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("mmsid-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"mmsid/prompts/{path.name}" for path in (ROOT / "prompts").glob("*.md")}
    wanted |= {f"mmsid/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    wanted |= {"mmsid/annotate/weights/demo_captioner/model.safetensors", "mmsid/annotate/weights/demo_captioner/README.md"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "mmsid/catalog/demo/fonts").glob("*.ttf")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "mmsid/report").iterdir() if path.suffix in (".j2", ".css", ".js")}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    assert wheel.stat().st_size < 25_000_000
