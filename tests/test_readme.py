"""Every command and Python snippet of README, CONTRIBUTING and docs runs, with small settings, except those in `NOT_RUN`.

YAML blocks are checked in test_docs.py. Pages below docs/experiments record what was run at their time, and are not run again.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from export_parts import tiny_language_model
from test_quantize_vectors import write_vectors

from mmsid.config import load_yaml
from mmsid.stages import stage_configs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


LINES = [
    line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip() and not line.startswith("#")
]
COMMANDS = list(dict.fromkeys(LINES))
NOT_RUN = {  # start of a command -> why it is not run here
    "pip install ": "the tests run in an environment that has mmsid",
    "make ": ".ci/run calls make, and make builds a virtual environment of its own",
    ".venv/bin/": "development commands of CONTRIBUTING.md: .ci/run calls them through make",
    "python scripts/configuration_page.py": "writes a page of the checkout; test_configuration_reference.py compares it",
}
FIRST = ("mmsid demo", "mmsid bundle", "accelerate launch scripts/train_reward.py")  # in this order, before the other commands
QUALITY = ["text_quality.model.steps=150", "text_quality.least_accuracy=0.6", "text_quality.most_calibration_error=0.5"]
DEMO = [
    "train_tokenizer.steps=2",
    "train_tokenizer.decoder_steps=2",
    "train_tokenizer.codebook_size=16",
    "baselines.codebook_size=16",
    "refine.top_m=3",
    "refine.loop.rounds=2",
    "train_recommender.seeds=[0]",
    "train_recommender.schedule.epochs=1",
    "refine.gate.draws=50",
]
SMALL = {
    "mmsid demo ": ["--items", "150", "--users", "120", *DEMO],
    "train_reward.py": QUALITY,
    "train_recommender_rl.py": [
        "train_recommender_rl.schedule={epochs: 2}",
        "train_recommender_rl.reinforcement={steps: 3, histories: 4, group: 4}",
    ],
    "mmsid stability": ["stability.max_items=20"],
    "configs/demo.yaml": DEMO,
    "configs/captioner_demo.yaml": [
        "train_captioner.drawn.cards=64",
        "train_captioner.drawn.held_out=8",
        "train_captioner.drawn.seen=0",
        *[f"train_captioner.{phase}={{steps: 2, batch_size: 8}}" for phase in ("vision_warmup", "captioning", "joint")],
    ],
    "--suite new_items": [
        "suite.protocols=[hidden]",
        "suite.schedule.epochs=1",
        "suite.tokenizer={steps: 1, reconstruct: off}",
        "suite.results=results",
        "dataset.codebook_size=16",
    ],
    "bench --dataset demo": ["suite.schedule.epochs=1", "dataset.codebook_size=16"],
    "benchmarks/decoding.py": ["--items", "500", "--batch", "2", "--beam", "4", "--repeats", "1", "--out", "decoding.json"],
    "benchmarks/encoding.py": ["--items", "40", "--codes", "8", "--repeats", "1", "--out", "encoding.json"],
    "benchmarks/serve_load.py": ["--seconds", "2", "--clients", "2", "--appends", "9", "--out", "serve_load.json"],
    "benchmarks/recommending.py": ["--items", "300", "--users", "3", "--out", "recommending.json"],
    "benchmarks/quantize_scale.py": ["--items", "2000", "--dim", "8", "--out", "quantize_scale.json"],
    "benchmarks/assignment.py": ["--rows", "1000", "--dim", "16", "--sizes", "1000", "--repeats", "1", "--out", "assignment.json"],
}

PREPARED = {  # first line of a snippet -> code that runs before it
    "processor = mmsid.TrieLogitsProcessor.from_table(bundle.table, text_tokenizer, prompt_length=prompt.shape[1])": """
import sys, torch, mmsid
from transformers import GPT2Config, GPT2LMHeadModel
sys.path.insert(0, TESTS)
from tiny_backbones import tiny_tokenizer
bundle, text_tokenizer, prompt = mmsid.load_bundle("runs/demo/bundle"), tiny_tokenizer(), torch.tensor([[1, 2]])
text_tokenizer.add_tokens(bundle.table.vocabulary())
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(text_tokenizer), n_embd=16, n_layer=1, n_head=2))
""".replace("TESTS", repr(str(ROOT / "tests"))),
    'catalog = {"items": "data/items.parquet", "sequences": "data/sequences.parquet"}': """
import mmsid, os
os.symlink("demo/catalog", "data")
""",
}


def test_readme_and_docs_name_existing_files():
    assert "mmsid demo" in COMMANDS and "`make demo`" in TEXT and "`make test`" in TEXT and len(COMMANDS) >= 20
    for path in re.findall(r"(?:configs|scripts|benchmarks|prompts)/[\w./-]*\w", TEXT):
        assert (ROOT / path).exists(), f"README or docs name {path}, which does not exist"
    for page in PAGES:
        for link in re.findall(r"\]\(([\w./-]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which does not exist"


def test_every_command_that_is_not_run_has_a_reason_and_exists():
    for start, reason in NOT_RUN.items():
        assert len(reason) > 20 and any(command.startswith(start) for command in COMMANDS), f"remove {start!r} from NOT_RUN"


def test_readme_has_at_most_160_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_yaml_of_the_readme_is_valid(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(blocks("yaml")[0])
    assert list(stage_configs(load_yaml(path), str(path)))[-1] == "report"


@pytest.mark.slow
def test_commands_and_snippets_run(tmp_path):
    """All commands and snippets except `make`, in an empty folder, with overrides that make each stage small."""
    for name in ("benchmarks", "configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "2"}

    def call(command: list[str], shown: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{shown}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    def serve(command: list[str]) -> None:
        """Start the service, run all curl commands against it, and stop it."""
        served = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert any("serves runs/demo/bundle" in line for line in served.stderr), "the service did not start"
            for line in COMMANDS:
                if line.startswith("curl ") and shutil.which("curl"):
                    call([*shlex.split(line), "--silent", "--show-error", "--fail-with-body"], line)
        finally:
            served.terminate()
        assert served.wait(60) == 0

    write_vectors(tmp_path)
    tiny_language_model(tmp_path / "models" / "lm")
    ordered = sorted(COMMANDS, key=lambda command: next((at for at, part in enumerate(FIRST) if command.startswith(part)), len(FIRST)))
    for command in ordered:
        if command.startswith((*NOT_RUN, "curl ")):
            continue
        if not (tmp_path / "ad.jpg").exists() and (pictures := sorted((tmp_path / "demo" / "catalog" / "images").glob("*.jpg"))):
            shutil.copyfile(pictures[0], tmp_path / "ad.jpg")
        if command.startswith("mmsid serve"):
            serve(shlex.split(command))
            continue
        small = next((overrides for part, overrides in SMALL.items() if part in f"{command} "), [])
        call([*shlex.split(command.replace("/tmp/ads", str(tmp_path / "ads"))), *small], command)
    for snippet in blocks("python"):
        call([sys.executable, "-c", PREPARED.get(snippet.split("\n")[0], "") + snippet], snippet)
