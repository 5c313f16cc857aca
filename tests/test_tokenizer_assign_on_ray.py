"""`mmsid assign --engine ray` on a local Ray cluster gives the SIDs, margins, embeddings and errors of a single process."""

import numpy as np
import pytest
from tiny_backbones import tiny_bert
from tiny_catalog import write_catalog

from mmsid.artifacts import is_complete, read_json, read_manifest, read_table, read_tensors, writing
from mmsid.errors import MmsidError
from mmsid.sids import SidTable
from mmsid.sids.folder import INTRINSIC
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer

RAY = {
    "actors": 2,
    "cpus_per_actor": 0.5,
    "rows_per_task": 30,
}  # three tasks: whole windows of 64 items


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> assign.AssignConfig:
    folder = tmp_path_factory.mktemp("assign")
    catalog = write_catalog(folder, items=150)
    settings = {"codebook_size": 24, "num_levels": 2, "steps": 2, "batch_size": 8, "reconstruct": "off"}
    backbone = BackboneSettings(path=tiny_bert(folder / "bert"), max_length=40)
    tokenizer = train.run(train.TrainTokenizerConfig(out=folder / "tokenizer", catalog=catalog, backbone=backbone, **settings))
    return assign.AssignConfig(
        out=folder / "sids", tokenizer=tokenizer, catalog=catalog, free_text_nats=0.01, collisions="suffix", batch_size=1, ray=RAY
    )


@pytest.mark.slow
def test_sids_equal_those_of_a_single_process(ray, config, tmp_path):
    # policy `suffix`: with `relocate`, items that fit a code equally well may be swapped by rounding in an actor's threads
    local = assign.run(config)
    ray_out = assign.run(config.model_copy(update={"out": tmp_path / "sids"}), engine="ray")
    expected, found = SidTable.load(local), SidTable.load(ray_out)
    assert expected.item_ids == found.item_ids and np.array_equal(expected.raw_codes, found.raw_codes)
    assert np.array_equal(expected.suffix, found.suffix) and len(np.unique(found.raw_codes, axis=0)) > 1
    assert np.allclose(expected.margin, found.margin, atol=1e-5)
    assert read_table(local / "overruled.parquet") == read_table(ray_out / "overruled.parquet")
    assert read_manifest(local)["config"]["free_text_nats"] == 0.01 and "ray" not in read_manifest(ray_out)["config"]
    embeddings = [read_tensors(path / "embeddings.safetensors")["embeddings"] for path in (local, ray_out)]
    assert np.allclose(*embeddings, atol=1e-5)
    errors = [[level["mse"] for level in read_json(path / INTRINSIC)["fidelity"]] for path in (local, ray_out)]  # of the head scores
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.slow
def test_a_damaged_tokenizer_raises_the_same_error(ray, config, tmp_path):
    tokenizer = ItemTokenizer.from_pretrained(config.tokenizer)
    tokenizer.head.projection.weight.data.fill_(float("nan"))
    tokenizer.head.bias.data.fill_(float("nan"))
    messages = []
    for engine in ("local", "ray"):
        broken = _saved(tokenizer, tmp_path / f"broken_{engine}")
        with pytest.raises(MmsidError, match="NaN or infinite") as error:
            assign.run(config.model_copy(update={"out": tmp_path / engine, "tokenizer": broken}), engine=engine)
        messages.append(str(error.value).replace(f"broken_{engine}", "broken"))
        assert not is_complete(tmp_path / engine)
    assert messages[0] == messages[1]


def _saved(tokenizer, folder):
    with writing(folder, stage="train_tokenizer", config={}) as draft:
        tokenizer.save_pretrained(draft.path)
    return folder
