"""Attention rule, embedding hook and padding on a bidirectional encoder, a causal model and two vision-language models."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_backbones import tiny_bert, tiny_decoder, tiny_llava, tiny_paligemma

from mmsid.backbone.lora import LoraSettings, add_lora, target_modules
from mmsid.backbone.query_tokens import QueryBackbone
from mmsid.backbone.text import TextBackbone
from mmsid.backbone.vlm import VlmBackbone
from mmsid.errors import ConfigError, PictureError

BUILDERS = {"bert": tiny_bert, "qwen2": tiny_decoder, "llava": tiny_llava, "paligemma": tiny_paligemma}


@dataclass
class Ad:
    text: str
    pictures: tuple = ()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=list(BUILDERS))
def backbone(request, tmp_path_factory) -> QueryBackbone:
    path = BUILDERS[request.param](tmp_path_factory.mktemp(request.param))
    build = VlmBackbone if request.param in ("llava", "paligemma") else TextBackbone
    return build(path, num_levels=3, max_length=24).eval()


def ads(backbone: QueryBackbone) -> list[Ad]:
    has_pictures = isinstance(backbone, VlmBackbone)
    texts = ["red striped shoe for running", "blue lamp", "green chair for office home garden new sale", "bag"]
    return [Ad(text, (picture(i),) if has_pictures else ()) for i, text in enumerate(texts)]


@torch.no_grad()
def test_attention_rule(backbone: QueryBackbone) -> None:
    assert backbone.causal == (not isinstance(backbone, TextBackbone) or backbone.model.config.model_type != "bert")
    batch = backbone.collate(ads(backbone))
    before = backbone.token_states(batch)
    kept = backbone.queries.data.clone()
    content = before.content_mask

    def after(index: int):
        backbone.queries.data[index] += 3 * torch.randn(kept.shape[1], generator=torch.Generator().manual_seed(index))
        states = backbone.token_states(batch)
        backbone.queries.data.copy_(kept)
        return states

    emb = after(3)
    assert torch.allclose(emb.content[content], before.content[content], atol=1e-5)
    assert torch.allclose(emb.queries[:, :3], before.queries[:, :3], atol=1e-5)
    assert (emb.queries[:, 3] - before.queries[:, 3]).abs().max() > 1e-3
    second = after(1)
    assert torch.allclose(second.content[content], before.content[content], atol=1e-5)
    assert torch.allclose(second.queries[:, 0], before.queries[:, 0], atol=1e-5)
    assert ((second.queries[:, 1:] - before.queries[:, 1:]).abs().amax((0, 2)) > 1e-4).all()
    other = backbone.token_states(backbone.collate([*ads(backbone)[:-1], Ad("noble winter dotted", ads(backbone)[-1].pictures)]))
    assert ((other.queries[3] - before.queries[3]).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_hook_equals_the_plain_forward_on_content(backbone: QueryBackbone) -> None:
    """The plain forward pass of the model, without query tokens, gives the same content states."""
    for ad in ads(backbone):
        plain = backbone.model(**backbone.tokens(ad)).last_hidden_state[0]
        states = backbone.token_states(backbone.collate([ad]))
        assert torch.allclose(states.content[0, : plain.shape[0]], plain, atol=1e-5)
    embedding = backbone.model.get_input_embeddings()
    assert not embedding._forward_hooks, "the hook is removed after the call"


@torch.no_grad()
def test_padding_and_other_items_have_no_effect(backbone: QueryBackbone) -> None:
    together = backbone.read(backbone.collate(ads(backbone), pad_to=16))
    for i, ad in enumerate(ads(backbone)):
        for pad_to in (1, 64):
            alone = backbone.read(backbone.collate([ad], pad_to=pad_to))
            assert torch.allclose(alone.states[0], together.states[i], atol=1e-5)
            assert torch.allclose(alone.pooled[0], together.pooled[i], atol=1e-5)


def test_lora_and_queries_get_gradient(tmp_path) -> None:
    for name in ("bert", "llava"):
        path = BUILDERS[name](tmp_path / name)
        backbone = (VlmBackbone if name == "llava" else TextBackbone)(path, max_length=24)
        add_lora(backbone, LoraSettings(r=2, last_layers=1))
        names = [n for n, p in backbone.named_parameters() if p.requires_grad]
        assert all("lora_" in n or n == "queries" for n in names) and len(names) > 1
        assert not any("vision" in n for n in names)
        assert all(".1." in n for n in names if "lora_" in n), "only the last of two layers"
        backbone.train()(backbone.collate(ads(backbone))).square().sum().backward()
        assert backbone.queries.grad.abs().sum() > 0
        # at step 0 the B matrices are zero, so only they get gradients
        assert all(p.grad.abs().sum() > 0 for n, p in backbone.named_parameters() if "lora_B" in n)
    with pytest.raises(ConfigError, match="match no linear layer"):
        target_modules(backbone.model, LoraSettings(targets=["nothing"]))


@torch.no_grad()
def test_items_without_text_or_pictures(tmp_path) -> None:
    text = TextBackbone(tiny_bert(tmp_path / "bert"), max_length=24)
    assert torch.isfinite(text(text.collate([Ad(""), Ad("red shoe")]))).all()

    def broken(path):
        if path == "broken":
            raise PictureError("truncated")
        return path

    vlm = VlmBackbone(tiny_llava(tmp_path / "llava"), max_length=4, max_pictures=2, open_picture=broken)
    items = [Ad("red shoe", (picture(0), picture(1), picture(2))), Ad("", ("broken",)), Ad("blue lamp for the garden and the office")]
    batch = vlm.collate(items)
    assert batch["pixel_values"].shape[0] == 2, "at most two pictures per item, broken pictures are skipped"
    assert torch.isfinite(vlm(batch)).all()
    assert torch.allclose(vlm(vlm.collate([items[2]]))[0], vlm(batch)[2], atol=1e-5)


def test_unloadable_backbone_is_a_config_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TextBackbone(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="positions for"):
        TextBackbone(tiny_bert(tmp_path / "bert"), max_length=500)


@torch.no_grad()
def test_the_demo_captioner_is_a_backbone_by_name() -> None:
    vlm = VlmBackbone("demo", max_length=8)
    states = vlm(vlm.collate([Ad("", (picture(0),)), Ad("", (picture(1),)), Ad("", (picture(0),))]))
    assert torch.allclose(states[0], states[2], atol=1e-5) and not torch.allclose(states[0], states[1], atol=1e-2)
