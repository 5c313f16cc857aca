"""Parts of the captioner: template, labels, patch targets, Muon, text tokenizer, the model through the Auto classes."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmsid.annotate.captioner import evaluate
from mmsid.annotate.captioner.labels import MISSING, LabelHeads, build_labels, patch_masks
from mmsid.annotate.captioner.model import ModelSizes, build_captioner, build_processor, save_captioner, sine_positions, tower
from mmsid.annotate.captioner.model import train_text_tokenizer as train_tokens
from mmsid.annotate.captioner.muon import Muon, split_parameters
from mmsid.annotate.captioner.template import CaptionTemplate
from mmsid.annotate.captioner.training import tower_states
from mmsid.catalog.demo import facts as demo

DEMO = "a {color} {pattern} {product} by {brand}, priced {price}, headline {headline}"
TINY = ModelSizes(
    image_size=48, tower_hidden=32, tower_layers=1, tower_heads=2, tower_intermediate=48, text_hidden=32, text_layers=1, text_heads=2,
    text_intermediate=48, vocabulary=420,
)  # fmt: skip


def some_texts(number: int = 40) -> list[str]:
    rng = np.random.default_rng(0)
    cards = [demo.random_facts(rng) for _ in range(number)]
    return [json.dumps({"caption": demo.caption(f)}) for f in cards] + [json.dumps(demo.interests(f)) for f in cards]


@pytest.fixture(scope="module")
def tokens():
    return train_tokens(some_texts(), TINY.vocabulary, CaptionTemplate(DEMO).literals)


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_template_writes_the_captions_of_the_demo_and_parses_them(seed):
    facts = demo.random_facts(np.random.default_rng(seed))
    values = {name: str(getattr(facts, name)) for name in demo.PICTURE_FIELDS}
    template = CaptionTemplate(DEMO, {"product": list(demo.PRODUCTS)})
    assert template.write(values) == demo.caption(facts)  # "an orange ...", too
    assert template.read(demo.caption(facts)) == values


def test_template_parses_values_with_blanks_by_their_vocabulary():
    known = {"color": ["Navy Blue", "Blue"], "kind": ["Casual Shoes", "Shoes"], "who": ["Men", "Women"]}
    template = CaptionTemplate("{color} {kind} for {who}", known)
    assert template.read("Navy Blue Casual Shoes for Men") == {"color": "Navy Blue", "kind": "Casual Shoes", "who": "Men"}
    assert template.read("Blue Shoes for Women") == {"color": "Blue", "kind": "Shoes", "who": "Women"}
    assert template.read("Green Shoes for Women") == {"color": "Green", "kind": "Shoes", "who": "Women"}  # an unknown value is accepted
    assert template.read("another text") is None
    with pytest.raises(ValueError, match="at least one field"):
        CaptionTemplate("no fields")


def test_field_accuracy_by_hand():
    truth = {"color": ["red", "blue", "red"], "kind": ["mug", "pan", ""]}
    texts = ['{"caption": "a red mug"}', "a blue mug", "not a caption"]
    scored = evaluate.field_accuracy(texts, truth, CaptionTemplate("a {color} {kind}"))
    assert scored.fields == {"color": 2 / 3, "kind": 1 / 2}  # an empty true value is not scored
    assert scored.exact == pytest.approx(1 / 3) and scored.parsed == pytest.approx(2 / 3) and scored.count == 3
    assert scored.mean == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_majority_accuracy():
    assert evaluate.majority_accuracy(["a", "b", "b"], ["b", "a", "b", "c"]) == 0.5


def test_labels_split_digits_and_mark_unknown_values():
    labels = build_labels({"kind": ["pan", "", "mug"], "price": ["49", "10", ""]}, ["kind", "price"], ["price"])
    assert labels.names == ["kind", "price_tens", "price_units"]
    assert labels.vocabularies == {"kind": ["mug", "pan"], "price_tens": ["1", "4"], "price_units": ["0", "9"]}
    assert labels.codes.tolist() == [[1, 1, 1], [MISSING, 0, 0], [0, MISSING, MISSING]]


def test_patch_masks_by_hand():
    nan = float("nan")
    # 4 x 4 patches of 12 px. A wide box covers the centres (6, 18) and (18, 18). A box without a centre gets its middle patch.
    boxes = torch.tensor([[[0.0, 14.0, 24.0, 22.0], [20.0, 25.0, 23.0, 29.0], [nan] * 4]])
    masks = patch_masks(boxes, 48, 12)
    assert masks.shape == (1, 3, 16)
    assert masks[0].nonzero().tolist() == [[0, 4], [0, 5], [1, 9]]


def test_label_loss_of_uniform_predictions_by_hand():
    heads = LabelHeads(8, {"kind": 4, "size": 2}, {"kind": "thing"}, ("thing",))
    for head in [*heads.pooled.values(), *heads.patch.values(), heads.presence]:
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    states, codes = torch.randn(2, 4, 8), torch.tensor([[1, 0], [2, MISSING]])
    masks = torch.tensor([[[True, False, False, False]], [[True, True, False, False]]])
    log2 = float(np.log(2))
    presence = log2 * (3 * 2.0 + 5 * 0.5) / 8
    assert heads(states, codes, None).item() == pytest.approx((np.log(4) + log2) / 2, abs=1e-5)
    assert heads(states, codes, masks).item() == pytest.approx((np.log(4) + log2) / 2 + np.log(4) + presence, abs=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 12)])
def test_muon_moves_by_an_orthogonal_matrix(shape):
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.1, weight_decay=0.0).step()
    lengths = torch.linalg.svdvals(weight.detach()) / (0.1 * max(1, shape[0] / shape[1]) ** 0.5)
    assert lengths.min() > 0.6 and lengths.max() < 1.3
    assert (weight.detach() * weight.grad).sum() < 0  # downhill


def test_muon_iterates_in_float32():
    weight = torch.nn.Parameter(torch.zeros(16, 16))
    weight.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, weight_decay=0.0).step()
    assert not torch.equal(weight, weight.bfloat16().float())  # a bfloat16 update would be equal


def test_muon_gets_hidden_matrices_only(tokens):
    model = build_captioner(TINY, tokens)
    muon, rest = split_parameters([model])
    assert all(weight.dim() == 2 for weight in muon)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {id(weight) for weight in [*muon, *rest]} == set(names) and len(muon) + len(rest) == len(names)
    assert not any("embed" in names[id(weight)] for weight in muon)
    assert any("q_proj" in names[id(weight)] for weight in muon) and any("projector" in names[id(weight)] for weight in muon)


def test_text_tokenizer_round_trips_and_encodes_records_in_few_tokens(tokens):
    for text in [*some_texts(6), "Ünïcode — naïve 東京 {}", '{"caption": "12 new:words"}']:
        assert tokens.decode(tokens(text)["input_ids"], skip_special_tokens=True) == text
    larger, facts = train_tokens(some_texts(600), 640, CaptionTemplate(DEMO).literals), demo.random_facts(np.random.default_rng(1))
    assert len(larger(json.dumps({"caption": demo.caption(facts)}))["input_ids"]) <= 20
    assert len(larger(json.dumps(demo.interests(facts)))["input_ids"]) <= 32
    ids = tokens(", priced 49, headline")["input_ids"]
    assert [tokens.decode([i]) for i in ids].count("4") == 1  # every digit is a token


def test_saved_model_loads_through_the_auto_classes_and_generates(tmp_path, tokens):
    model, processor = build_captioner(TINY, tokens, seed=3).eval(), build_processor(TINY, tokens)
    save_captioner(model, processor, tmp_path)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").exists()
    again, reader = AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (60, 40), "red")}, {"type": "text", "text": "Describe"}]}
    ]
    inputs = reader.apply_chat_template(
        [chat, chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert inputs["pixel_values"].shape == (2, 3, 48, 48) and (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * 16
    first, second = (m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, again))
    assert torch.equal(first, second) and torch.equal(first[0], first[1])


def test_same_seed_gives_the_same_weights_and_sine_positions(tokens):
    one, two = build_captioner(TINY, tokens, seed=5), build_captioner(TINY, tokens, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    table = sine_positions(4, 32)
    assert torch.unique(table, dim=0).shape == (16, 32)
    assert torch.equal(tower(one).embeddings.position_embedding.weight, table)


def test_heads_and_projector_have_the_same_input(tokens):
    model, inputs = build_captioner(TINY, tokens).eval(), []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    pixels = torch.randn(2, 3, 48, 48)
    ids = torch.tensor([[model.config.image_token_id] * 16 + [300]] * 2)
    with torch.no_grad():
        model(input_ids=ids, pixel_values=pixels)
        assert torch.equal(inputs[0], tower_states(tower(model), pixels))
