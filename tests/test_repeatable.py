"""The same seed gives the same gradients to the bit, on several threads too: figures that change from run to run prove nothing."""

from collections.abc import Iterator

import pytest
import torch

from mmsid.recommend.instrument import Instrument, InstrumentShape
from mmsid.tokenizer.heads import ResidualHead

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


def test_the_recommender_that_measures_semantic_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    paths = torch.randint(8, (2000, 3), generator=generator)
    model = Instrument(paths, (8, 8, 8), torch.ones_like(paths, dtype=torch.bool), InstrumentShape())
    histories = torch.randint(2000, (256, 12), generator=generator)
    assert_repeatable(model, lambda: model(histories))


def test_the_head_of_the_tokenizer() -> None:
    generator = torch.Generator().manual_seed(0)
    head = ResidualHead(64, num_levels=3, codebook_size=8, code_dim=96)
    torch.nn.init.normal_(head.vectors, generator=generator)
    states, codes = torch.randn(2048, 3, 64, generator=generator), torch.randint(8, (2048, 3), generator=generator)
    assert_repeatable(head, lambda: -head.teacher_logits(head.project(states), codes).log_softmax(-1).square().mean())
