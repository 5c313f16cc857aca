"""Processors without torchvision give the tokens of the complete processors with torchvision; a torchvision that does not fit is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import FAMILIES
from torchvision_schemas import FOLDER

COMPARE = """
import sys
from pathlib import Path
from torchvision_schemas import import_torchvision
import_torchvision()
import torch
from transformers import AutoProcessor
from tiny_families import FAMILIES, picture
from mmsid.backbone.chat import ChatFormat
from mmsid.backbone.processors import load_processor
for name, build in FAMILIES.items():
    folder = build(Path(sys.argv[1]) / name)
    complete, ours = AutoProcessor.from_pretrained(folder), load_processor(folder)
    assert not type(complete.image_processor).__name__.endswith("Pil"), "this is the torchvision backend"
    for pictures in ([picture(0, 1200, 900)], [picture(0, 640, 480), picture(1, 300, 500)], []):
        chats = [ChatFormat(processor, name) for processor in (complete, ours)]
        rows = [chat.tokens(chat.prompt("Describe.", len(pictures)), pictures) for chat in chats]
        assert rows[0].keys() == rows[1].keys(), (name, rows[0].keys(), rows[1].keys())
        for key, expected in rows[0].items():
            found = rows[1][key]
            assert found.shape == expected.shape, (name, key, found.shape, expected.shape)
            # pixels: a few of 255 grey levels, because PIL rounds after each pass of the resize
            far = (found.float() - expected.float()).abs()
            assert far.max() <= (0.05 if found.is_floating_point() else 0) and far.mean() < 0.005, (name, key, far.max())
    print(name, flush=True)
"""


@pytest.mark.slow
def test_tokens_and_pixels_are_those_of_the_complete_processors(tmp_path):
    if not FOLDER.is_dir():
        pytest.skip(f"no torchvision in {FOLDER}; `make test-all` installs it there")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    found = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == list(FAMILIES)


def test_a_torchvision_that_does_not_fit_torch_is_named_with_its_remedy(tmp_path):
    package, record = tmp_path / "torchvision", tmp_path / "torchvision-0.28.0.dist-info"
    package.mkdir(), record.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    (tmp_path / "mine.yaml").write_text("name: mine\ncatalog: {items: items.parquet}\ntrain_captioner: {base_model: x}\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    command = [sys.executable, "-m", "mmsid.cli", "train_captioner", "--config", str(tmp_path / "mine.yaml")]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert found.returncode == 1 and "pip uninstall torchvision (mmsid does not need it)" in found.stderr, found.stderr[-2000:]
    assert "Traceback" not in found.stderr
