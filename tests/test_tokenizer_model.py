"""`ItemTokenizer`: raw codes that do not depend on batch, order or saving; and refused tokenizer folders."""

import random

import numpy as np
import pytest
import torch
from tiny_backbones import WORDS, tiny_bert, tiny_llava

from mmsid.artifacts import read_json, write_json
from mmsid.backbone.embed import embed_texts
from mmsid.backbone.lora import LoraSettings
from mmsid.errors import ArtifactError
from mmsid.tokenizer import model
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer, TokenizerSettings


def some_items(count: int, seed: int = 0) -> list[ItemInput]:
    rng = random.Random(seed)
    return [ItemInput(" ".join(rng.choices(WORDS, k=rng.randint(0, 14)))) for _ in range(count)]


def tiny(path: str, **settings) -> ItemTokenizer:
    backbone = BackboneSettings(path=path, max_length=48, lora=LoraSettings(r=2), kind=settings.pop("kind", "text"))
    tokenizer = ItemTokenizer(TokenizerSettings(backbone=backbone, codebook_size=16, code_dim=8, **settings))
    with torch.no_grad():  # imitates a trained adapter: LoRA is the identity before training
        for name, weight in tokenizer.named_parameters():
            if "lora_B" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return tokenizer.eval()


@pytest.mark.parametrize("head", ["residual", "parallel"])
def test_codes_do_not_depend_on_batch_order_or_saving(head: str, tmp_path) -> None:
    tokenizer, items = tiny(tiny_bert(tmp_path / "bert"), head=head), some_items(64)
    together = tokenizer.encode(items)
    assert together.raw_codes.shape == (64, 3) and together.margin.min() >= 0
    assert len(together.raw_codes.unique(dim=0)) > 5
    assert torch.allclose(together.embedding.norm(dim=1), torch.ones(64), atol=1e-5)
    alone = torch.cat([tokenizer.encode([item]).raw_codes for item in items])
    assert torch.equal(alone, together.raw_codes)
    order = random.Random(1).sample(range(64), 64)
    shuffled = tokenizer.encode([items[i] for i in order], batch_size=5)
    assert torch.equal(shuffled.raw_codes, together.raw_codes[order])
    tokenizer.save_pretrained(tmp_path / "saved")
    again = ItemTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode(items).raw_codes, together.raw_codes)
    assert again.sha256() == tokenizer.sha256() == read_json(tmp_path / "saved" / "config.json")["tokenizer_sha256"]
    assert not [path for path in (tmp_path / "saved").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")], "no pickles"
    assert tokenizer.encode([]).raw_codes.shape == (0, 3)


def test_codes_within_rounding_are_encoded_alone(tmp_path, monkeypatch) -> None:
    """With an infinite threshold, every item is encoded again: scores equal those of the item alone and unpadded, bit for bit."""
    tokenizer, items = tiny(tiny_bert(tmp_path / "bert")), some_items(6)
    monkeypatch.setattr(model, "ROUNDING_MARGIN", float("inf"))
    together = tokenizer.encode(items)
    for i, item in enumerate(items):
        assert torch.equal(tokenizer._encode_batch(tokenizer.backbone.tokens_of([item]))[3][0], together.scores[i])


def test_batches_hold_items_of_like_token_count(tmp_path, monkeypatch) -> None:
    """Texts of equal length in characters and unequal length in tokens: batches have no padding."""
    tokenizer = tiny(tiny_bert(tmp_path / "bert"))
    items = [ItemInput(("striped " * (n % 5) + "q" * 40)[:40]) for n in range(40)]
    read, stack = [], tokenizer.backbone.stack
    monkeypatch.setattr(model, "ROUNDING_MARGIN", 0.0)
    monkeypatch.setattr(
        tokenizer.backbone, "stack", lambda rows, *pad: read.append(stack(rows, *pad)["attention_mask"]) or stack(rows, *pad)
    )
    codes = tokenizer.encode(items, batch_size=8).raw_codes
    assert len(read) == 5 and len({mask.shape[1] for mask in read}) == 5
    assert all(mask.all() for mask in read), "eight items of each count: no padding"
    assert torch.equal(codes[0], codes[5]) and torch.equal(codes[4], codes[39])


def test_vlm_tokenizer_saves_and_loads(tmp_path) -> None:
    from PIL import Image

    tokenizer = tiny(tiny_llava(tmp_path / "llava"), kind="vlm")
    noise = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    items = [ItemInput("red shoe", (Image.fromarray(noise[0]),)), ItemInput("", (Image.fromarray(noise[1]),)), ItemInput("blue lamp")]
    codes = tokenizer.encode(items)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = ItemTokenizer.from_pretrained(tmp_path / "saved").encode(items[::-1])
    assert torch.equal(again.raw_codes.flip(0), codes.raw_codes)
    assert (codes.scores[0] - codes.scores[1]).abs().max() > 1e-4


def test_refused_folders(tmp_path) -> None:
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        ItemTokenizer.from_pretrained(tmp_path)
    tokenizer = tiny(tiny_bert(tmp_path / "bert"))
    tokenizer.save_pretrained(tmp_path / "saved")
    tiny_bert(tmp_path / "bert", hidden=64)  # other weights at the same path
    with pytest.raises(ArtifactError, match="other weights"):
        ItemTokenizer.from_pretrained(tmp_path / "saved")
    config = read_json(tmp_path / "saved" / "config.json") | {"format": 99}
    write_json(tmp_path / "saved" / "config.json", config)
    with pytest.raises(ArtifactError, match="format 99"):
        ItemTokenizer.from_pretrained(tmp_path / "saved")


def test_minilm_starts_as_its_own_sentence_embedding() -> None:
    """The packaged encoder: content never sees the query tokens, so the pooled content is the embedding of MiniLM."""
    texts = ["a red running shoe", "a guitar for beginners", "acoustic guitar"]
    embedded = embed_texts([*texts, texts[0]])
    assert np.array_equal(embedded[0], embedded[3]) and embedded[1] @ embedded[2] > 0.6 > embedded[0] @ embedded[1]
    tokenizer = ItemTokenizer(TokenizerSettings(codebook_size=16, code_dim=8)).eval()
    items = [ItemInput(text) for text in texts]
    with torch.no_grad():
        pooled = tokenizer.backbone.read(tokenizer.backbone.collate(items)).pooled
    assert np.allclose(torch.nn.functional.normalize(pooled, dim=-1).numpy(), embedded[:3], atol=1e-5)
    together = tokenizer.encode(items).raw_codes
    assert torch.equal(torch.cat([tokenizer.encode([one]).raw_codes for one in items]), together)
