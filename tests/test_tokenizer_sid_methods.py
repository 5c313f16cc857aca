"""SID methods: all quantizers and collision policies, the category path by hand, published sets, the text cache."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from test_tokenizer_inputs import item
from tiny_catalog import write_catalog

from mmsid.artifacts import read_json
from mmsid.catalog import read_catalog, split_histories
from mmsid.errors import ArtifactError, ConfigError
from mmsid.quantize import rq_vae
from mmsid.sids import SidTable
from mmsid.tokenizer import baselines, sid_methods
from mmsid.tokenizer.sid_methods import MethodSources, MethodSpec, category_codes, import_published, make_sids

PUBLISHED = {  # items minus distinct SIDs, from the README of amazon_scientific; 0 for the other sets
    "rkmeans_native": 875,
    "rqvae_native": 554,
    "quasid_native": 122,
    "letter_native": 27,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> MethodSources:
    folder = tmp_path_factory.mktemp("methods")
    config = write_catalog(folder)
    catalog = read_catalog(config)
    return MethodSources(catalog, split_histories(catalog, config.split), max_length=16, cache=folder / "cache")


def quick_rq_vae(monkeypatch) -> None:
    monkeypatch.setattr("mmsid.quantize.fit.rq_vae", lambda *args: rq_vae(*args, steps=20, latent_dim=8, hidden=16))


@pytest.mark.parametrize("method", ["rq_kmeans", "balanced_rq", "rq_vae"])
@pytest.mark.parametrize("space", ["text", "fused"])
def test_every_quantizer_in_both_spaces_under_every_policy(method, space, sources, tmp_path, monkeypatch) -> None:
    quick_rq_vae(monkeypatch)
    raw = {}
    for policy in ("none", "suffix", "relocate"):
        spec = MethodSpec(method=method, space=space, collisions=policy, num_levels=2, codebook_size=9)
        table = make_sids(spec, sources, tmp_path / policy, seed=0)
        read = SidTable.load(tmp_path / policy)
        assert read.item_ids == table.item_ids == [one.item_id for one in sources.catalog.items]
        assert np.array_equal(read.codes, table.codes) and table.codes.max() < 9
        raw[policy] = table.raw_codes
        if policy != "none":
            assert len(np.unique(table.full_codes(), axis=0)) == 64
        figures = read_json(tmp_path / policy / "intrinsic.json")
        assert {"retrieval", "retrieval_prefix", "retrieval_decoded"} <= figures.keys()
    assert np.array_equal(raw["none"], raw["suffix"]) and np.array_equal(raw["none"], raw["relocate"])


def test_codes_depend_on_seed_space_and_weight(sources, tmp_path) -> None:
    def codes(seed: int, **spec: object) -> np.ndarray:
        chosen = MethodSpec.model_validate({"method": "balanced_rq", "codebook_size": 8, "num_levels": 2, "collisions": "none"} | spec)
        return make_sids(chosen, sources, tmp_path / str(seed), seed).codes

    first = codes(0)
    assert np.array_equal(first, codes(0)) and not np.array_equal(first, codes(1))
    assert not np.array_equal(first, codes(0, space="fused"))
    assert not np.array_equal(codes(0, space="fused"), codes(0, space="fused", behaviour_weight=5.0))


def test_held_out_users_are_not_used(sources, tmp_path) -> None:
    """Behaviour vectors come from the fit users only."""
    split = sources.split
    emptied = replace(split, train=[rows[:0] if held else rows for rows, held in zip(split.train, split.held_out)])
    assert split.held_out.any()
    assert np.array_equal(replace(sources, split=emptied).behaviour(0), sources.behaviour(0))


def test_text_is_embedded_once_for_all_processes(sources, monkeypatch) -> None:
    first = sources.text
    monkeypatch.setattr(sid_methods, "embed_texts", lambda *_, **__: pytest.fail("embedded again"))
    again = MethodSources(sources.catalog, sources.split, max_length=16, cache=sources.cache)
    assert np.array_equal(again.text, first)
    with pytest.raises(pytest.fail.Exception, match="embedded again"):
        _ = MethodSources(sources.catalog, max_length=17, cache=sources.cache).text  # other settings, other cache entry


def test_category_path_by_hand() -> None:
    items = [
        item(categories=("all", "shoe", "red")),
        item(categories=("all", "bag")),
        item(categories=("all", "bag", "red", "deep")),
        item(),
        item(categories=("all",)),
    ]
    codes, sizes = category_codes(items, 2)
    # the shared root "all" is left out. Level 1: "" < all < bag < shoe. Level 2, at depth min(2, own depth): "" < all < bag < red
    assert codes.tolist() == [[3, 3], [2, 2], [2, 3], [0, 0], [1, 1]] and sizes == (4, 4)
    assert category_codes(items, 8)[1] == (4, 4, 5)  # no deeper than the deepest path
    with pytest.raises(ConfigError, match=r"map catalog\.fields\.categories"):
        category_codes([item(), item()], 3)


def test_category_path_numbers_the_items_of_a_path(sources, tmp_path) -> None:
    table = make_sids(MethodSpec(method="category_path", collisions="suffix", num_levels=3), sources, tmp_path, seed=0)
    assert len(np.unique(table.full_codes(), axis=0)) == 64 and len(np.unique(table.codes, axis=0)) < 64
    with pytest.raises(ValidationError, match="no scores to relocate by"):
        MethodSpec(method="category_path")


def test_the_stage_refuses_unknown_methods(tmp_path) -> None:
    with pytest.raises(ValidationError, match="'random', 'rq_kmeans', 'balanced_rq_text' or 'balanced_rq'"):
        baselines.BaselinesConfig.model_validate({"out": tmp_path, "catalog": {"items": "x"}, "methods": ["letter"]})


def test_published_sets_are_read_in_the_given_order(sources, tmp_path) -> None:
    table = make_sids(MethodSpec(method="category_path", collisions="suffix"), sources, tmp_path, seed=0)
    order = table.item_ids[::-1]
    read = import_published(tmp_path / "index.json", None, order)
    assert read.item_ids == order and np.array_equal(read.full_codes(), table.align(order).full_codes())
    with pytest.raises(ArtifactError, match="no Semantic ID"):
        import_published(tmp_path / "index.json", None, [*order, "unknown"])


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "columns"), [("amazon_scientific", 10), ("amazon_beauty", 11)])
def test_collisions_of_published_sets_match_their_readme(data_root: Path, name: str, columns: int) -> None:
    path = data_root / name / "reference_sids.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is absent: set MMSID_DATA to the folder that holds it")
    table = pq.read_table(path)
    item_ids = table["item_id"].to_pylist()
    found = [column for column in table.column_names if column != "item_id"]
    assert len(found) == columns
    for column in found:
        sids = import_published(path, column, item_ids[::-1])
        assert sids.num_levels == 4 and len(sids) == len(item_ids) and max(sids.codebook_sizes) <= 256
        assert sids.item_ids[-1] == item_ids[0] and table[column][0].as_py() == " ".join(
            f"<{letter}_{code}>" for letter, code in zip("abcd", sids.codes[-1])
        )
        if name == "amazon_scientific":
            assert len(sids) - len(np.unique(sids.codes, axis=0)) == PUBLISHED.get(column, 0), column
