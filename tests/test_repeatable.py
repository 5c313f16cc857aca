"""Gradients are bit-identical for the same seed, also with several threads."""

from collections.abc import Iterator

import pytest
import torch
from tiny_backbones import WORDS, tiny_bert

from mmsid.recommend.paths import ItemPaths
from mmsid.recommend.sid_transformer import SidTransformer, SidTransformerShape
from mmsid.tokenizer.heads import ResidualHead
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import BackboneSettings, ItemTokenizer, TokenizerSettings
from mmsid.tokenizer.objective import Labels, LossWeights, Objective
from mmsid.tokenizer.reconstruction import train_decoder

TIMES = 8


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def gradients(model: torch.nn.Module, loss) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    loss().backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def assert_repeatable(model: torch.nn.Module, loss) -> None:
    first = gradients(model, loss)
    for _ in range(TIMES):
        assert all(torch.equal(one, again) for one, again in zip(first, gradients(model, loss), strict=True))


def test_gradients_of_the_sid_transformer_are_repeatable() -> None:
    generator = torch.Generator().manual_seed(0)
    paths = torch.randint(8, (2000, 3), generator=generator)
    model = SidTransformer(ItemPaths(paths.numpy(), (8, 8, 8)), SidTransformerShape())
    histories = torch.randint(2000, (256, 12), generator=generator)
    assert_repeatable(model, lambda: model(histories))


def test_gradients_of_the_sid_head_are_repeatable() -> None:
    generator = torch.Generator().manual_seed(0)
    head = ResidualHead(64, num_levels=3, codebook_size=8, code_dim=96)
    torch.nn.init.normal_(head.vectors, generator=generator)
    states, codes = torch.randn(2048, 3, 64, generator=generator), torch.randint(8, (2048, 3), generator=generator)
    assert_repeatable(head, lambda: -head.teacher_logits(head.project(states), codes).log_softmax(-1).square().mean())


def test_gradients_of_all_tokenizer_losses_are_repeatable(tmp_path) -> None:
    backbone = BackboneSettings(path=tiny_bert(tmp_path / "bert", hidden=128), max_length=48)
    tokenizer = ItemTokenizer(TokenizerSettings(backbone=backbone, codebook_size=16, code_dim=32))
    items, half = 256, 128
    texts = [" ".join(WORDS[(row + word) % len(WORDS)] for word in range(3 + row % 9)) for row in range(items)]
    objective = Objective(tokenizer, LossWeights(), train_decoder(texts, prompt_length=4, steps=2, width=32))
    generator = torch.Generator().manual_seed(0)
    batch = tokenizer.backbone.collate([ItemInput(text) for text in texts])
    labels = Labels(
        torch.arange(items),
        torch.randint(16, (items, 3), generator=generator),
        torch.randn(items, 32, generator=generator),
        torch.randint(4, (items, 3), generator=generator),
        torch.ones(half, dtype=torch.bool),
        torch.ones(half, dtype=torch.bool),
        *objective.decoder.ids(texts),
    )
    assert_repeatable(objective, lambda: objective(batch, labels)[0])
    assert objective.tokenizer.backbone.queries.grad is not None
