"""After refinement, the content reading learns the refined codes; codes of items with behaviour hardly move."""

import copy

import pytest
import torch

from mmsid.refine.content_reading import codes_as_new, teach_content_reading
from mmsid.refine.item_states import ItemStates
from mmsid.tokenizer.behaviour import BehaviourSettings
from mmsid.tokenizer.heads import ParallelHead, ResidualHead

ITEMS, HIDDEN, DIM, CODES = 400, 12, 4, 4


def _planted(kind):
    """A head whose codes follow behaviour, which content determines by a linear map that the head knows roughly."""
    generator = torch.Generator().manual_seed(0)
    settings = BehaviourSettings(source="vectors", dim=DIM)
    head = (
        ResidualHead(HIDDEN, 1, CODES, HIDDEN + DIM, settings) if kind == "residual" else ParallelHead(HIDDEN, 1, CODES, settings)
    ).eval()
    content = torch.randn(ITEMS, 1, HIDDEN, generator=generator)
    rule = torch.randn(HIDDEN, DIM, generator=generator)
    code = (content[:, 0] @ rule).argmax(1)
    behaviour = torch.cat([torch.nn.functional.one_hot(code, DIM), torch.full((ITEMS, 1), 99.0)], 1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.projection.weight[-DIM:] = rule.T + 0.8 * torch.randn(DIM, HIDDEN, generator=generator)
        head.behaviour.value.copy_(5 * torch.eye(DIM))
        head.vectors[0, :, -DIM:] = 2 * torch.eye(DIM)
    return head, ItemStates(content, behaviour.float()), code[:, None]


@pytest.mark.parametrize("kind", ["residual", "parallel"])
def test_new_items_get_the_codes_of_items_like_them(kind):
    head, states, codes = _planted(kind)
    known, new = ItemStates(states.content[:300], states.behaviour[:300]), states.content[300:]
    assert torch.equal(head.greedy(head.project(known[:])).codes, codes[:300])
    before = (head.greedy(head.content(new)).codes == codes[300:]).float().mean()
    figures = teach_content_reading(head, known, codes[:300], seed=0)
    assert figures["after"] < figures["before"]
    assert (head.greedy(head.content(new)).codes == codes[300:]).float().mean() > before + 0.1
    assert torch.equal(head.greedy(head.project(known[:])).codes, codes[:300]), "items with behaviour keep their codes"
    assert all(weight.requires_grad for weight in head.parameters())


def test_nothing_is_trained_without_behaviour():
    head, states, codes = _planted("residual")
    before = copy.deepcopy(head.state_dict())
    nobody = ItemStates(states.content, torch.zeros_like(states.behaviour))
    assert teach_content_reading(head, nobody, codes, 0) == {}
    assert teach_content_reading(ParallelHead(HIDDEN, 1, CODES), ItemStates(states.content), codes, 0) == {}
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("kind", ["residual", "parallel"])
def test_codes_as_new_are_learnt_from_other_items_only(kind):
    head, states, codes = _planted(kind)
    before = copy.deepcopy(head.state_dict())
    found = torch.from_numpy(codes_as_new(head, states, seed=0))
    untaught = head.greedy(head.content(states.content)).codes
    assert (found == codes).float().mean() > (untaught == codes).float().mean() + 0.1
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    # codes that content does not determine cannot be learnt from others
    shuffled = states.behaviour[torch.randperm(ITEMS, generator=torch.Generator().manual_seed(1))]
    arbitrary = ItemStates(states.content, shuffled)
    own = head.greedy(head.project(arbitrary[:])).codes
    assert (torch.from_numpy(codes_as_new(head, arbitrary, seed=0)) == own).float().mean() < 0.4


def test_without_behaviour_the_codes_of_an_item_are_those_that_it_would_have_as_a_new_one():
    _, states, _ = _planted("residual")
    plain = ParallelHead(HIDDEN, 1, CODES)
    assert torch.equal(
        torch.from_numpy(codes_as_new(plain, ItemStates(states.content), 0)), plain.greedy(plain.project(states.content)).codes
    )
