"""The public API as a user calls it: stages as functions, new ads as dictionaries, neighbours, trie-constrained `generate`."""

import io
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny_backbones import tiny_bert, tiny_llava, tiny_tokenizer
from tiny_catalog import write_catalog
from transformers import GPT2Config, GPT2LMHeadModel

import mmsid
from mmsid.errors import CatalogError, ConfigError, PictureError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder made through the public functions."""
    folder = tmp_path_factory.mktemp("run")
    catalog = write_catalog(folder).model_dump()
    backbone = {"path": tiny_bert(folder / "bert"), "max_length": 40}
    settings = {"codebook_size": 6, "steps": 2, "batch_size": 8, "reconstruct": "off", "backbone": backbone}
    tokenizer = mmsid.train_tokenizer(folder / "tokenizer", catalog, **settings)
    sids = mmsid.assign(folder / "sids", catalog, tokenizer)
    mmsid.bundle(folder / "bundle", tokenizer, sids)
    return folder


def test_a_user_encodes_new_ads_finds_neighbours_and_generates(run):
    bundle = mmsid.load_bundle(run / "bundle")
    ads = [
        {"title": "red shoe", "categories": ["wear", "shoe"], "image": Image.new("RGB", (32, 32), "red"), "caption": "a red shoe"},
        {"title": "oak lamp", "attributes": {"material": "oak"}},
    ]
    encoded = bundle.tokenizer.encode(ads)
    neighbours = bundle.neighbours(encoded.embedding, k=3)
    text_tokenizer = tiny_tokenizer()
    text_tokenizer.add_tokens(bundle.table.vocabulary())
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(text_tokenizer), n_embd=16, n_layer=1, n_head=2)).eval()
    prompt = torch.tensor([[1, 2]])
    processor = mmsid.TrieLogitsProcessor.from_table(bundle.table, text_tokenizer, prompt_length=2)
    written = model.generate(prompt, logits_processor=[processor], max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)
    sid = tuple(text_tokenizer.convert_ids_to_tokens(written[0, 2:].tolist()))

    assert encoded.raw_codes.shape == (2, 3) and int(encoded.raw_codes.max()) < 6
    assert [len(found) for found in neighbours] == [3, 3] and neighbours[0][0][1] >= neighbours[0][1][1]
    assert sid in {bundle.table.sid(item_id) for item_id in bundle.table.item_ids}


def test_an_item_of_the_catalogue_is_its_own_neighbour(run):
    bundle = mmsid.load_bundle(run / "bundle")
    catalog = mmsid.Catalog.read({"items": run / "items.parquet"})
    item = catalog.items[5]
    encoded = bundle.tokenizer.encode([item])
    (found,) = bundle.neighbours(encoded.embedding, k=1)
    assert found[0][1] == pytest.approx(1.0, abs=1e-5)
    # the item was published by its behaviour and is read here by its content, as a new item is
    assert bundle.table.source[bundle.table.row_of[item.item_id]] == "behaviour"
    assert torch.equal(encoded.raw_codes, bundle.tokenizer.encode([{"title": "other"}, item]).raw_codes[1:])


@pytest.mark.parametrize("given", ["pil", "bytes", "path", "dataset row"])
def test_pictures_are_given_as_pil_bytes_path_or_dataset_row(tmp_path, given):
    from mmsid.tokenizer.model import BackboneSettings, TokenizerSettings

    picture = Image.new("RGB", (40, 30), (200, 30, 60))
    picture.save(tmp_path / "ad.png")
    data = (tmp_path / "ad.png").read_bytes()
    value = {"pil": picture, "bytes": data, "path": str(tmp_path / "ad.png"), "dataset row": {"bytes": data, "path": None}}[given]
    backbone = BackboneSettings(kind="vlm", path=tiny_llava(tmp_path / "llava"), max_length=16)
    tokenizer = mmsid.ItemTokenizer(TokenizerSettings(backbone=backbone, codebook_size=4, use=("title", "pictures")))
    with_picture = tokenizer.encode([{"title": "red shoe", "image": value}])
    without = tokenizer.encode([{"title": "red shoe"}])
    assert torch.equal(with_picture.embedding, tokenizer.encode([{"title": "red shoe", "images": [picture]}]).embedding)
    assert not torch.equal(with_picture.embedding, without.embedding)


@pytest.mark.parametrize(
    ("ad", "error", "words"),
    [
        ({"titel": "shoe"}, CatalogError, "item 0 has the unknown key 'titel'; known keys: item_id, title"),
        ({"title": ["shoe"]}, CatalogError, "item 0, title is .*expected text"),
        ({"categories": [1]}, CatalogError, "item 0, categories is .*list of texts"),
        ({"attributes": "oak"}, CatalogError, "item 0, attributes is 'oak', expected a mapping"),
        ({"image": "https://example.org/a.jpg"}, PictureError, "URLs are not downloaded"),
        ({"image": b"no picture"}, PictureError, "no allowed decoder"),
        ({"image": 3}, CatalogError, "item 0, image is a int, expected a PIL image"),
        ("red shoe", CatalogError, "item 0 is a str; give a dictionary"),
    ],
)
def test_bad_ads_are_refused_with_their_place(run, ad, error, words):
    tokenizer = mmsid.ItemTokenizer.from_pretrained(run / "tokenizer")
    with pytest.raises(error, match=words):
        tokenizer.encode([ad])


def test_a_picture_that_the_tokenizer_cannot_read_is_a_warning(run):
    tokenizer = mmsid.ItemTokenizer.from_pretrained(run / "tokenizer")
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    with pytest.warns(UserWarning, match="item 0 has a picture, but this tokenizer does not read pictures"):
        tokenizer.encode([{"title": "shoe", "image": png.getvalue()}])


def test_stage_functions_refuse_wrong_keys_and_keep_finished_folders(run):
    catalog = {"items": run / "items.parquet", "sequences": run / "sequences.parquet"}
    with pytest.raises(ConfigError, match=r"unknown key assign\.colisions; did you mean 'collisions'"):
        mmsid.assign(run / "other", catalog, run / "tokenizer", colisions="none")
    before = (run / "sids" / "sids.parquet").stat().st_mtime_ns
    config = write_catalog(run).model_dump()
    assert mmsid.assign(run / "sids", config, run / "tokenizer") == run / "sids"
    assert (run / "sids" / "sids.parquet").stat().st_mtime_ns == before


def test_every_public_name_exists_and_is_documented():
    for name in mmsid.__all__:
        value = getattr(mmsid, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="the public API is"):
        mmsid.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_else():
    """Names are imported on first use: a script that only reads the version, or a shell completion, waits for no torch."""
    check = "import sys, mmsid; heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules); assert not heavy, heavy; "
    check += "ours = {name for name in sys.modules if name.startswith('mmsid')}; assert ours == {'mmsid', 'mmsid._version'}, ours"
    subprocess.run([sys.executable, "-c", check], check=True)
