"""`mmsid assign --engine ray`: the SIDs, margins and embeddings of this process, and its errors, from the actors of a real Ray."""

import numpy as np
import pytest
from tiny_backbones import tiny_bert
from tiny_catalog import write_catalog

from mmsid.artifacts import is_complete, read_json, read_manifest, read_table, read_tensors, writing
from mmsid.errors import MmsidError
from mmsid.sids import read_sid_folder
from mmsid.sids.folder import INTRINSIC
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer

RAY = {"actors": 2, "cpus_per_actor": 0.5, "rows_per_task": 30}  # tasks take whole windows: here three, of 64 batches of one


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
def test_on_ray_every_item_gets_the_sid_it_gets_here(ray, config, tmp_path):
    # `suffix`, since two items that fit a code equally well may change places with the rounding of an actor's threads
    here = assign.run(config)
    there = assign.run(config.model_copy(update={"out": tmp_path / "sids"}), engine="ray")
    ours, theirs = read_sid_folder(here), read_sid_folder(there)
    assert ours.item_ids == theirs.item_ids and np.array_equal(ours.raw_codes, theirs.raw_codes)
    assert np.array_equal(ours.suffix, theirs.suffix) and len(np.unique(theirs.raw_codes, axis=0)) > 1
    assert np.allclose(ours.margin, theirs.margin, atol=1e-5)
    assert read_table(here / "overruled.parquet") == read_table(there / "overruled.parquet")
    assert read_manifest(here)["config"]["free_text_nats"] == 0.01 and "ray" not in read_manifest(there)["config"]
    embeddings = [read_tensors(path / "embeddings.safetensors")["embeddings"] for path in (here, there)]
    assert np.allclose(*embeddings, atol=1e-5)
    rebuilt = [
        [level["mse"] for level in read_json(path / INTRINSIC)["fidelity"]] for path in (here, there)
    ]  # of what the head scores with, row by row
    assert rebuilt[0] == pytest.approx(rebuilt[1], rel=1e-4)


@pytest.mark.slow
def test_a_damaged_tokenizer_is_told_of_as_it_is_here(ray, config, tmp_path):
    tokenizer = ItemTokenizer.from_pretrained(config.tokenizer)
    tokenizer.head.projection.weight.data.fill_(float("nan"))
    tokenizer.head.bias.data.fill_(float("nan"))
    told = []
    for engine in ("local", "ray"):
        broken = _saved(tokenizer, tmp_path / f"broken_{engine}")
        with pytest.raises(MmsidError, match="NaN or infinite") as error:
            assign.run(config.model_copy(update={"out": tmp_path / engine, "tokenizer": broken}), engine=engine)
        told.append(str(error.value).replace(f"broken_{engine}", "broken"))
        assert not is_complete(tmp_path / engine)
    assert told[0] == told[1]


def _saved(tokenizer, folder):
    with writing(folder, stage="train_tokenizer", config={}) as draft:
        tokenizer.save_pretrained(draft.path)
    return folder
