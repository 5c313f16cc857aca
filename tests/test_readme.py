"""Every command of the README is run: those of the first screen by `.ci/run` (`make demo`, `make test`), the others here, made small."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmsid.config import load_yaml
from mmsid.stages import stage_configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip() and not line.startswith("#")]
SMALL = {
    "mmsid stability": ["stability.max_items=20"],
    "configs/demo.yaml": [
        "train_tokenizer.steps=2",
        "train_tokenizer.decoder_steps=2",
        "train_tokenizer.codebook_size=16",
        "baselines.codebook_size=16",
        "refine.top_m=3",
        "refine.loop.rounds=2",
        "train_recommender.seeds=[0]",
        "train_recommender.schedule.epochs=1",
        "refine.gate.draws=50",
    ],
    "configs/captioner_demo.yaml": [
        "train_captioner.drawn.cards=64",
        "train_captioner.drawn.held_out=8",
        "train_captioner.drawn.seen=0",
        *[f"train_captioner.{phase}={{steps: 2, batch_size: 8}}" for phase in ("see", "tell", "joint")],
    ],
    "bench --dataset demo": ["suite.schedule.epochs=1", "dataset.codebook_size=16"],
    "benchmarks/decoding.py": ["--items", "500", "--batch", "2", "--beam", "4", "--repeats", "1", "--out", "decoding.json"],
    "benchmarks/encoding.py": ["--items", "40", "--codes", "8", "--repeats", "1", "--out", "encoding.json"],
    "benchmarks/new_items.py": ["--steps", "1", "--epochs", "1", "--out", "new_items.json", "codebook_size=16"],
    "benchmarks/assignment.py": ["--rows", "1000", "--dim", "16", "--sizes", "1000", "--repeats", "1", "--out", "assignment.json"],
}


def test_the_readme_has_commands_and_names_only_files_that_exist():
    assert "make demo" in COMMANDS and "make test" in COMMANDS and len(COMMANDS) >= 8
    for path in re.findall(r"(?:configs|scripts|benchmarks|prompts)/[\w./-]*\w", README):
        assert (ROOT / path).exists(), f"README names {path}, which is not there"


def test_the_yaml_of_the_readme_is_accepted(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    assert list(stage_configs(load_yaml(path), str(path)))[-1] == "report"


@pytest.mark.slow
def test_every_other_command_runs(tmp_path):
    """In the README's order, in an empty folder, with overrides that make each stage small."""
    for name in ("benchmarks", "configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "2"}

    def call(command: str) -> None:
        done = subprocess.run(shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    call("mmsid demo-catalog demo/catalog --items 150 --users 120 --seed 0")
    for command in COMMANDS:
        if command.startswith("make "):
            continue
        small = next((overrides for part, overrides in SMALL.items() if part in command), [])
        call(" ".join([command.replace("/tmp/ads", str(tmp_path / "ads")), *map(shlex.quote, small)]))
