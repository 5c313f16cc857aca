"""Contents of the wheel: prompts, example configurations, fonts, the packaged captioner, report assets."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_contains_prompts_configs_fonts_and_weights(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("mmsid-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"mmsid/prompts/{path.name}" for path in (ROOT / "prompts").glob("*.md")}
    expected |= {f"mmsid/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    expected |= {"mmsid/annotate/weights/demo_captioner/model.safetensors", "mmsid/annotate/weights/demo_captioner/README.md"}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "mmsid/catalog/demo/fonts").glob("*.ttf")}
    for package in ("report", "serve"):
        assets = (path for path in (ROOT / "mmsid" / package).iterdir() if path.suffix in (".j2", ".html", ".css", ".js"))
        expected |= {str(path.relative_to(ROOT)) for path in assets}
    assert expected <= names, f"missing: {sorted(expected - names)}"
    assert wheel.stat().st_size < 25_000_000
