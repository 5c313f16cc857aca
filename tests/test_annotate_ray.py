"""One annotation job in this process, in the processes of `accelerate launch` and in Ray actors gives the same rows."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog
from chat_server import Batching, ChatServer

from mmsid.annotate.caption import run
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.records import Caption
from mmsid.artifacts import read_manifest
from mmsid.catalog import CatalogConfig
from mmsid.catalog.demo import write_demo_catalog
from mmsid.errors import ConfigError
from mmsid.ray_pool import RayConfig, _actors

COMPARED = ("item_id", "creative", "caption", "status", "reason", "flags", "attempts", "rejected")
ADS = 60


def compared(rows):
    return [{name: row[name] for name in COMPARED} for row in rows]


def test_a_missing_ray_raises_an_error_with_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    catalog = write_catalog(tmp_path / "catalog", items=2)
    with pytest.raises(ConfigError, match=r"pip install 'mmsid\[ray\]'"):
        run(caption_config(catalog, tmp_path / "caption"), StubGenerator(), engine="ray")


@pytest.mark.parametrize(
    "slots, options, expected",
    [
        ({"CPU": 4.0}, {}, 3),
        ({"CPU": 4.0}, {"actors": 2}, 2),
        ({"CPU": 4.0}, {"cpus_per_actor": 0.5}, 6),
        ({"CPU": 32.0, "GPU": 8.0}, {"gpus_per_actor": 2.0}, 4),
        ({"CPU": 2.0}, {"actors": 2}, "2 actors of 1 CPU and 0 GPU slots do not fit into the cluster's 2 CPU"),
        ({"CPU": 1.0}, {}, "1 actors"),
        ({"CPU": 32.0, "GPU": 1.0}, {"actors": 2, "gpus_per_actor": 1.0}, "lower ray.actors"),
    ],
)
def test_actors_leave_one_slot_free(slots, options, expected):
    class Cluster:
        @staticmethod
        def cluster_resources():
            return slots

    config = RayConfig(**options)
    if isinstance(expected, int):
        assert _actors(Cluster, config, config.gpus_per_actor or 0.0) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            _actors(Cluster, config, config.gpus_per_actor or 0.0)


class KilledOnce(HuggingFaceGenerator):
    """Kills its own process at the third batch, once. The file `marker` holds the id of the killed process."""

    def __init__(self, marker: Path) -> None:
        super().__init__("demo", max_new_tokens=96, schema=Caption.model_json_schema())
        self.marker, self.batches = marker, 0

    def __reduce__(self):
        return KilledOnce, (self.marker,)

    def generate(self, requests):
        self.batches += 1
        if self.batches == 3 and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(requests)


@pytest.fixture(scope="module")
def ads(tmp_path_factory) -> CatalogConfig:
    folder = write_demo_catalog(tmp_path_factory.mktemp("drawn") / "ads", items=ADS, users=0, seed=3)
    return CatalogConfig(items=folder / "items.parquet")


def ads_config(ads, out, **options):
    small = {"batch_size": 4, "shard_rows": 16, "max_new_tokens": 96, "ray": {"actors": 2, "cpus_per_actor": 0.5, "rows_per_task": 8}}
    return caption_config(ads, out, **small | options)


def approximately(rows: list[dict]) -> list[dict]:
    """The rows, with log-probabilities up to the last stored digit: the sum of a batch depends on its other rows."""
    return [row | {"log_probability": pytest.approx(row["log_probability"], abs=0.0011)} for row in rows]


@pytest.fixture(scope="module")
def local_rows(ads, tmp_path_factory):
    return rows_of(run(ads_config(ads, tmp_path_factory.mktemp("local") / "caption")))


@pytest.mark.slow
def test_the_demo_model_behind_a_server_gives_the_same_rows(ads, local_rows, tmp_path):
    with ChatServer(Batching(HuggingFaceGenerator("demo", max_new_tokens=96), batch_size=4)) as server:
        options = {"base_url": server.url, "concurrency": 8}
        rows = rows_of(run(ads_config(ads, tmp_path / "caption", generator="openai", server=options)))
    assert compared(rows) == compared(local_rows)
    assert len(rows) >= ADS and all(row["status"] == "ok" for row in rows)


@pytest.mark.slow
def test_ray_gives_the_same_rows_when_an_actor_is_killed(ray, ads, local_rows, tmp_path):
    marker = tmp_path / "killed"
    config = ads_config(ads, tmp_path / "caption", cache=tmp_path / "answers.sqlite")
    out = run(config, KilledOnce(marker), engine="ray")
    assert marker.read_text() != str(os.getpid())
    assert rows_of(out) == approximately(local_rows)
    assert read_manifest(out)["counts"] == {"in": len(local_rows), "ok": len(local_rows), "quarantined": 0}
    # the cache holds the results of the actors, for every engine
    second = run(ads_config(ads, tmp_path / "second" / "caption", cache=tmp_path / "answers.sqlite"))
    assert rows_of(second) == approximately(local_rows)
    assert "generated" not in read_manifest(second)["extra"]["work"]


@pytest.mark.slow
def test_errors_of_actors_are_raised_unchanged(ray, tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=4)

    class Broken(StubGenerator):
        def generate(self, requests):
            raise ConfigError("the model is broken; replace it")

    with pytest.raises(ConfigError, match=r"^the model is broken; replace it$"):
        run(caption_config(catalog, tmp_path / "caption"), Broken(), engine="ray")


def _yaml(folder: Path, ads: CatalogConfig, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"name: {name}\nruns: {folder}\ncatalog: {{items: {ads.items}}}\n"
        "caption: {batch_size: 4, shard_rows: 16, max_new_tokens: 96, cache: null, ray: {cpus_per_actor: 0.5, rows_per_task: 8}}\n"
    )
    return path


@pytest.mark.slow
def test_accelerate_launch_distributes_the_shards(ads, local_rows, tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "caption.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, str(script), "--config", str(_yaml(tmp_path, ads, "ranks"))], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "ranks" / "caption"
    manifest = read_manifest(out)
    assert manifest["extra"]["processes"] == 2
    assert manifest["counts"]["in"] == manifest["extra"]["work"]["generated"] == len(local_rows)
    assert rows_of(out) == approximately(local_rows)
    assert not list(out.glob("rank-*"))
