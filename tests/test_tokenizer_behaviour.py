"""Behaviour input of the tokenizer: trust, two readings, vectors of new items from stored factors, user files, append and refresh."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tiny_backbones import tiny_bert

from mmsid import ItemTokenizer, SidTable
from mmsid.artifacts import read_json
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.cli import main
from mmsid.errors import ArtifactError, ConfigError
from mmsid.sids.readings import load_readings, readings_file
from mmsid.tokenizer.behaviour import BehaviourInput, BehaviourSettings, ItemBehaviour, behaviour_of_catalog
from mmsid.tokenizer.behaviour_weight import choose_trust_and_weight
from mmsid.tokenizer.heads import ResidualHead
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import BackboneSettings, TokenizerSettings
from mmsid.tokenizer.refresh import moving_items

COLORS, PRODUCTS = ("red", "blue", "green", "black"), ("shoe", "bag", "lamp", "chair", "watch", "bowl")


def test_fusion_by_hand():
    """Two content coordinates, one of behaviour, one price: g = 3 / (3 + 1); only the behaviour coordinate moves."""
    behaviour = BehaviourInput(BehaviourSettings(source="vectors", dim=1), first=2)
    behaviour.value.data.fill_(2.0)
    s = torch.tensor([[[1.0, 2.0, 0.5, 9.0]], [[1.0, 2.0, 0.5, 9.0]]])
    found = behaviour(s, torch.tensor([[1.0, 3.0], [1.0, 0.0]]))
    assert found[0, 0].tolist() == [1.0, 2.0, 0.25 * 0.5 + 0.75 * 2.0, 9.0]
    assert torch.equal(found[1], s[1]), "no interactions: the content reading"


def test_behaviour_of_a_state_is_replaced_without_reading_the_content_again():
    behaviour = BehaviourInput(BehaviourSettings(source="vectors", dim=2), first=1)
    behaviour.value.data.copy_(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
    torch.manual_seed(0)
    s = torch.randn(4, 3, 5)
    before, after = (torch.cat([torch.randn(4, 2), counts[:, None]], 1) for counts in torch.tensor([[3.0, 1, 40, 0], [2.0, 0, 39, 0]]))
    assert torch.allclose(behaviour.replaced(behaviour(s, before), before, after), behaviour(s, after), atol=1e-5)
    assert torch.allclose(behaviour.replaced(behaviour(s, before), before, torch.zeros(4, 3)), s, atol=1e-5)


def test_head_reads_both_and_needs_room_for_behaviour():
    torch.manual_seed(0)
    settings = BehaviourSettings(source="vectors", dim=2)
    head = ResidualHead(3, num_levels=2, codebook_size=4, code_dim=5, behaviour=settings)
    h = torch.cat([torch.randn(6, 2, 3), torch.randn(6, 1, 2).expand(-1, 2, -1), torch.ones(6, 2, 1)], -1)
    content, both = head.content(h), head.project(h)
    assert torch.equal(content[..., :3], both[..., :3]) and not torch.equal(content[..., 3:], both[..., 3:])
    h[..., -1] = 0
    assert torch.equal(head.project(h), content)
    with pytest.raises(ValueError, match=r"code_dim is 4, but content and behaviour need 3 \+ 2"):
        ResidualHead(3, 2, 4, 4, settings)


def test_a_text_may_have_as_many_tokens_as_the_behaviour_has_entries(tmp_path):
    backbone = BackboneSettings(path=tiny_bert(tmp_path / "bert"), max_length=40)
    plain = ItemTokenizer(TokenizerSettings(backbone=backbone, codebook_size=4, code_dim=40))
    items = [ItemInput("red shoe"), ItemInput("blue bag for the office")]
    dim = plain.backbone.tokens(items[0])["input_ids"].shape[1] - 1
    settings = plain.settings.model_copy(update={"behaviour": BehaviourSettings(source="vectors", dim=dim)})
    tokenizer, vectors = ItemTokenizer(settings), np.eye(2, dim, dtype=np.float32)
    together = tokenizer.encode(items, behaviour=vectors).scores
    alone = torch.cat([tokenizer.encode(items[row : row + 1], behaviour=vectors[row : row + 1]).scores for row in range(2)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_refresh_moves_the_worst_fitting_items_first():
    raw, old = np.array([[1, 1], [2, 2], [3, 3], [4, 4]]), np.array([[1, 1], [2, 0], [3, 0], [4, 0]])
    assert moving_items(np.array([9.0, 1.0, 3.0, 2.0]), raw, old, most=2).tolist() == [False, False, True, True]
    assert moving_items(np.array([9.0, 1.0, 3.0, 2.0]), raw, old, most=9).tolist() == [False, True, True, True]


# --- a catalogue in which users keep to one group, and content does not tell the groups


def write_catalog(folder, *, items=60, new=0, extra_users=0):
    """Ads of random colours and products; the group of an ad, number % 4, shows in the histories only. `new` ads have no interactions,
    unless `extra_users` engage with them."""
    rng = np.random.default_rng(0)
    names = [f"{rng.choice(COLORS)} {rng.choice(PRODUCTS)} {number}" for number in range(items + new)]
    rows = [{"item_id": f"i{number}", "title": name} for number, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    groups = [[number for number in range(items) if number % 4 == group] for group in range(4)]
    users = [{"user_id": f"u{user}", "items": [f"i{n}" for n in rng.permutation(groups[user % 4])[:9]]} for user in range(200)]
    late = [[items + number for number in range(new) if number % 4 == group] for group in range(4)]
    for user in range(extra_users):
        mixed = rng.permutation([*rng.permutation(groups[user % 4])[:4], *late[user % 4]])
        users.append({"user_id": f"late{user}", "items": [f"i{n}" for n in [*mixed, *rng.permutation(groups[user % 4])[:2]]]})
    pq.write_table(pa.Table.from_pylist(users), folder / "sequences.parquet")
    return {"items": str(folder / "items.parquet"), "sequences": str(folder / "sequences.parquet")}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run (train_tokenizer, assign) through the command line."""
    folder = tmp_path_factory.mktemp("behaviour")
    settings = {
        "name": "first",
        "runs": str(folder / "runs"),
        "catalog": write_catalog(folder),
        "train_tokenizer": {
            "backbone": {"path": str(tiny_bert(folder / "bert")), "max_length": 24},
            "num_levels": 2, "codebook_size": 16, "steps": 4, "batch_size": 8, "reconstruct": "off", "start": {"behaviour_dim": 6},
        },
        "assign": {},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    main(["run", str(folder / "run.yaml")])
    return folder


def loaded(folder):
    config = yaml.safe_load((folder / "run.yaml").read_text())["catalog"]
    catalog = read_catalog(CatalogConfig(**config))
    return (
        ItemTokenizer.from_pretrained(folder / "runs/first/train_tokenizer"),
        catalog,
        split_histories(catalog, CatalogConfig(**config).split),
    )


def test_known_items_are_published_by_behaviour(run_folder):
    table = SidTable.load(run_folder / "runs/first/assign")
    assert set(table.source) == {"behaviour"}
    figures = read_json(run_folder / "runs/first/train_tokenizer/training.json")["figures"]
    assert 0.1 <= figures["kappa"] <= 30 and len(figures["agreement_of_readings"]) == 2
    # groups that content does not tell share first codes far more often than chance
    group = np.array([int(item_id[1:]) % 4 for item_id in table.item_ids])
    same = table.raw_codes[:, 0][:, None] == table.raw_codes[:, 0][None]
    alike = group[:, None] == group[None]
    off = ~np.eye(len(group), dtype=bool)
    assert same[alike & off].mean() > 2 * same[~alike].mean()


def test_encode_takes_behaviour_and_falls_back_to_content(run_folder):
    tokenizer, catalog, split = loaded(run_folder)
    known = behaviour_of_catalog(tokenizer.behaviour, catalog, split)
    content = tokenizer.encode(catalog.items)
    both = tokenizer.encode(catalog.items, behaviour=known.vectors, interactions=known.interactions)
    table = SidTable.load(run_folder / "runs/first/assign").align(catalog.item_ids)
    assert np.array_equal(both.raw_codes.numpy(), table.raw_codes)
    assert torch.equal(
        content.raw_codes, tokenizer.encode(catalog.items, behaviour=known.vectors, interactions=0 * known.interactions).raw_codes
    )
    assert not torch.equal(content.raw_codes, both.raw_codes)
    alone = tokenizer.encode(catalog.items[3:4], behaviour=known.vectors[3:4], interactions=known.interactions[3:4])
    assert torch.equal(alone.raw_codes[0], both.raw_codes[3])
    with pytest.raises(ConfigError, match=r"behaviour \(60, 5\).*expected \(60, 6\)"):
        tokenizer.encode(catalog.items, behaviour=known.vectors[:, :5])


def test_vectors_of_an_item_depend_on_its_own_interactions_only(run_folder):
    """Stored factors give the training's vectors again, and those of one item do not change when others get more interactions."""
    tokenizer, catalog, split = loaded(run_folder)
    known = behaviour_of_catalog(tokenizer.behaviour, catalog, split)
    more = replace(split, train=[*split.train, *[split.train[0]] * 3], held_out=np.append(split.held_out, [False] * 3))
    grown = behaviour_of_catalog(tokenizer.behaviour, catalog, more)
    untouched = ~np.isin(np.arange(len(catalog.items)), split.train[0])
    assert np.array_equal(known.vectors[untouched], grown.vectors[untouched])
    assert grown.interactions[split.train[0][0]] == known.interactions[split.train[0][0]] + 3
    assert behaviour_of_catalog(tokenizer.behaviour, catalog, None) is None


def test_assign_writes_the_readings_of_held_out_interactions(run_folder, tmp_path):
    """They equal those that encoding with shortened histories, and without behaviour, gives."""
    tokenizer, catalog, split = loaded(run_folder)
    sids, ids = run_folder / "runs/first/assign", catalog.item_ids
    table, readings = SidTable.load(sids).align(ids), load_readings(sids, ids)
    shortened = behaviour_of_catalog(tokenizer.behaviour, catalog, split.with_train([slice(-1)] * len(split.train), split.valid))
    expected = {
        "content": tokenizer.encode(catalog.items).raw_codes.numpy(),
        "shortened": tokenizer.encode(catalog.items, behaviour=shortened.vectors, interactions=shortened.interactions).raw_codes.numpy(),
    }
    for name, raw in expected.items():
        same = (raw == table.raw_codes).all(1, keepdims=True)
        assert np.array_equal(getattr(readings, name), np.where(same, table.codes, raw)) and not same.all()
    some = load_readings(sids / "sids.parquet", ids[5:7][::-1])
    assert np.array_equal(some.content, readings.content[[6, 5]])
    copy = shutil.copytree(sids, tmp_path / "copy")
    (copy / "SHA256SUMS").unlink()
    readings.rows(np.arange(3)).save(copy)
    with pytest.raises(ArtifactError, match=r"shape \(60, 2\)"):
        load_readings(copy, ids)
    with pytest.raises(ArtifactError, match="no Semantic ID for 'i99'"):
        load_readings(sids, ["i99"])
    (copy / "readings.safetensors").unlink()
    assert load_readings(copy, ids) is None


def test_append_moves_nothing_and_refresh_moves_what_behaviour_bears_out(run_folder, tmp_path):
    config = str(run_folder / "run.yaml")
    published = SidTable.load(run_folder / "runs/first/assign")
    for step in ("appended", "logged"):
        (tmp_path / step).mkdir()
    appended = write_catalog(tmp_path / "appended", new=8)
    shared = [f"assign.tokenizer={run_folder / 'runs/first/train_tokenizer'}", "name=grown"]
    paths = lambda catalog: [f"catalog.{key}={value}" for key, value in catalog.items()]  # noqa: E731
    main(["assign", "--config", config, "--append", str(run_folder / "runs/first/assign"), *shared, *paths(appended)])
    grown = SidTable.load(run_folder / "runs/grown/assign")
    assert np.array_equal(grown.align(published.item_ids).codes, published.codes)
    new = grown.align([f"i{number}" for number in range(60, 68)])
    earlier, later = (load_readings(run_folder / f"runs/{name}/assign", published.item_ids) for name in ("first", "grown"))
    assert np.array_equal(earlier.content, later.content) and np.array_equal(earlier.shortened, later.shortened)
    of_new = load_readings(run_folder / "runs/grown/assign", new.item_ids)
    assert np.array_equal(of_new.content, new.codes) and np.array_equal(of_new.shortened, new.codes)
    assert set(new.source) == {"content"} and set(grown.align(published.item_ids).source) == {"behaviour"}

    logged = write_catalog(tmp_path / "logged", new=8, extra_users=120)
    common = ["--append", str(run_folder / "runs/grown/assign"), shared[0], *paths(logged)]
    main(["assign", "--config", config, *common, "name=kept"])
    assert np.array_equal(SidTable.load(run_folder / "runs/kept/assign").align(grown.item_ids).codes, grown.codes)
    main(["assign", "--config", config, "--refresh", *common, "name=fresh", "assign.max_moved=0.05"])
    fresh = SidTable.load(run_folder / "runs/fresh/assign").align(grown.item_ids)
    moved = (fresh.codes != grown.codes).any(1)
    assert 1 <= moved.sum() <= 3, "5 % of 68 items"
    assert set(fresh.source[moved]) == {"behaviour"} and np.array_equal(fresh.source[~moved], grown.source[~moved])
    assert all(int(item_id[1:]) >= 60 for item_id, went in zip(fresh.item_ids, moved, strict=True) if went)
    old_sids = {tuple(row) for row in grown.codes[moved].tolist()}
    assert not old_sids & {tuple(row) for row in fresh.codes.tolist()}, "nobody else gets the codes of an item that moved"
    assert read_json(run_folder / "runs/fresh/assign/churn.json")["changed"]["any"] == pytest.approx(moved.mean())
    with pytest.raises(SystemExit):
        main(["assign", "--config", config, "--refresh", *paths(logged), "name=never"])


def test_vectors_of_the_user_are_an_input(run_folder, tmp_path, capsys):
    settings = yaml.safe_load((run_folder / "run.yaml").read_text())
    rng = np.random.default_rng(3)
    groups = rng.normal(size=(4, 5))
    rows = [{"item_id": f"i{number}", "vector": (groups[number % 4] + 0.1 * rng.normal(size=5)).tolist()} for number in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "two_tower.parquet")
    settings |= {"name": "own", "runs": str(tmp_path / "runs")}
    settings["train_tokenizer"]["behaviour"] = str(tmp_path / "two_tower.parquet")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    main(["run", str(tmp_path / "run.yaml")])
    table = SidTable.load(tmp_path / "runs/own/assign")
    assert {item_id for item_id, source in zip(table.item_ids, table.source, strict=True) if source == "content"} == {
        f"i{n}" for n in range(50, 60)
    }
    tokenizer = ItemTokenizer.from_pretrained(tmp_path / "runs/own/train_tokenizer")
    assert tokenizer.settings.behaviour.source == "vectors" and tokenizer.settings.behaviour.dim == 5
    wrong = [row | {"vector": row["vector"][:4]} for row in rows]
    pq.write_table(pa.Table.from_pylist(wrong), tmp_path / "wrong.parquet")
    with pytest.raises(SystemExit):
        main(["assign", "--config", str(tmp_path / "run.yaml"), f"assign.behaviour={tmp_path / 'wrong.parquet'}", "--redo"])
    assert "dimension 4, the tokenizer reads 5" in capsys.readouterr().err
    pq.write_table(pa.Table.from_pylist(rows[:-1]), tmp_path / "two_tower.parquet")
    with pytest.raises(SystemExit):
        main(["train_tokenizer", "--config", str(tmp_path / "run.yaml")])
    assert "its input behaviour 1" in (error := capsys.readouterr().err) and "has changed" in error


def test_no_behaviour_is_content_alone(run_folder, tmp_path):
    main(["run", str(run_folder / "run.yaml"), "name=none", "train_tokenizer.behaviour=none"])
    assert ItemTokenizer.from_pretrained(run_folder / "runs/none/train_tokenizer").behaviour is None
    assert set(SidTable.load(run_folder / "runs/none/assign").source) == {"content"}
    assert readings_file(run_folder / "runs/none/assign") is None


def test_a_damaged_list_of_context_items_is_refused(run_folder, tmp_path):
    copy = shutil.copytree(run_folder / "runs/first/train_tokenizer", tmp_path / "copy")
    (copy / "manifest.json").unlink()
    (copy / "behaviour_items.parquet").unlink()
    pq.write_table(pa.table({"item_id": ["i0"]}), copy / "behaviour_items.parquet")
    with pytest.raises(ArtifactError, match="has 1 items, but the tokenizer has factors of 60"):
        ItemTokenizer.from_pretrained(copy)


@pytest.mark.parametrize(("told_by", "expected"), [("behaviour", 2.0), ("content", 0.5), ("few pairs", 1.0)])
def test_weight_of_behaviour_is_chosen_by_what_tells_the_next_item(told_by, expected):
    """Pairs of items of one group; either behaviour or content shows the group, the other is noise."""
    rng = np.random.default_rng(0)
    group = np.arange(300) % 10
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    shown, noise = unit(rng.normal(size=(10, 6))[group] + 0.3 * rng.normal(size=(300, 6))), unit(rng.normal(size=(300, 6)))
    content, vectors = (shown, noise) if told_by == "content" else (noise, shown)
    pairs = np.array([[row, rng.choice(np.flatnonzero(group == group[row]))] for row in rng.integers(300, size=400)])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]][: 50 if told_by == "few pairs" else None]
    known = ItemBehaviour(vectors, np.full(300, 50.0))
    assert choose_trust_and_weight(content, known, pairs, seed=0)[1] == expected
    assert choose_trust_and_weight(content, known, pairs, seed=0, weights=(1.4,))[1] == 1.4


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 0.1), (3.0, 3.0)])
def test_rare_behaviour_is_trusted_unless_it_is_noise(noise, expected):
    """Content predicts the group's vector. With one interaction, an item's own vector is exact, or noise."""
    rng = np.random.default_rng(0)
    group = np.arange(300) % 60
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    centres = rng.normal(size=(60, 8))
    content = unit(centres[group] + 0.8 * rng.normal(size=(300, 8)))
    vectors = unit(unit(centres)[group] + noise * rng.normal(size=(300, 8)))
    pairs = np.array([(a, b) for a in range(300) for b in np.flatnonzero(group == group[a]) if a != b])
    assert choose_trust_and_weight(content, ItemBehaviour(vectors, np.ones(300)), pairs, seed=0)[0] == expected
