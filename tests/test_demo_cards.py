"""Demo ads: facts, captions and drawn cards."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops

from mmsid.catalog.demo import cards, facts
from mmsid.catalog.demo.shapes import shape

ONE = facts.CardFacts("running shoe", "red", "striped", "Velo", 49, "SALE", "leather", "summer", "Nomad")


def _many(count: int, seed: int = 0) -> list[facts.CardFacts]:
    rng = np.random.default_rng(seed)
    return [facts.random_facts(rng) for _ in range(count)]


def test_caption_and_interests_of_one_card_are_as_documented():
    assert facts.caption(ONE) == "a red striped running shoe by Velo, priced 49, headline SALE"
    assert facts.caption(replace(ONE, color="orange")).startswith("an orange striped")
    assert facts.interests(ONE) == {
        "descriptors": [
            {"descriptor": "daily running", "confidence": 0.9},
            {"descriptor": "bold sporty taste", "confidence": 0.7},
            {"descriptor": "practical buyers", "confidence": 0.5},
        ],
        "summary": "daily running for practical buyers of bold sporty taste",
    }


def test_interests_depend_on_the_picture_only_and_stay_short():
    for f in _many(300):
        other_text = replace(f, material="steel", season="winter", collection="Atlas")
        assert facts.interests(f) == facts.interests(other_text)
        assert len(json.dumps(facts.interests(f))) <= 256
        names = [entry["descriptor"] for entry in facts.interests(f)["descriptors"]]
        assert len(set(names)) == len(names) == 3


def test_texts_never_contain_facts_that_only_the_picture_shows():
    rng = np.random.default_rng(0)
    picture_only = {word.lower() for words in (facts.COLORS, facts.PATTERNS, facts.BRANDS, facts.HEADLINES) for word in words}
    for f in _many(500):
        title, description = facts.texts(f, rng)
        words = set(re.findall(r"[a-z0-9-]+", f"{title} {description}".lower()))
        assert not words & picture_only
        assert not any(any(c.isdigit() for c in word) for word in words)
        assert f.categories[1] in words
        assert f.product not in f"{title} {description}".lower()


def test_vocabularies_have_their_documented_sizes_and_the_tree_has_three_levels():
    assert len(set(facts.PRODUCTS)) >= 24
    assert (len(facts.COLORS), len(facts.PATTERNS), len(facts.BRANDS), len(facts.HEADLINES)) == (8, 4, 8, 12)
    assert all(len(path) == 3 and path[2] == product for product, path in facts.CATEGORIES.items())
    assert [replace(ONE, price=p).price_tier for p in (10, 39, 40, 69, 70, 99)] == ["budget"] * 2 + ["middle"] * 2 + ["premium"] * 2


def test_held_out_share_is_near_its_target_and_ignores_the_other_facts():
    triples = [replace(ONE, product=p, color=c, pattern=q) for p in facts.PRODUCTS for c in facts.COLORS for q in facts.PATTERNS]
    assert abs(np.mean([facts.held_out(f) for f in triples]) - facts.HELD_OUT_SHARE) < 0.04
    assert all(facts.held_out(f) == facts.held_out(replace(f, brand="Ozio", price=10, headline="ECO")) for f in triples)
    rng = np.random.default_rng(0)
    assert all(facts.held_out(facts.random_facts(rng, True)) for _ in range(20))
    assert not any(facts.held_out(facts.random_facts(rng, False)) for _ in range(20))


def test_the_bytes_depend_on_the_generator_state_only():
    first, again, other = (cards.draw_card(ONE, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.jpeg == again.jpeg and first.boxes == again.boxes
    assert first.jpeg != other.jpeg


def test_cards_are_rgb_jpegs_with_all_boxes_inside():
    rng = np.random.default_rng(3)
    for f in _many(60):
        card = cards.draw_card(f, rng)
        assert card.image.size == (cards.CARD_SIZE, cards.CARD_SIZE) and card.image.mode == "RGB"
        assert card.jpeg.startswith(b"\xff\xd8")
        assert tuple(card.boxes) == cards.ELEMENTS
        for element, (x0, y0, x1, y1) in card.boxes.items():
            assert 0 <= x0 < x1 <= cards.CARD_SIZE and 0 <= y0 < y1 <= cards.CARD_SIZE, (element, card.boxes[element])


@pytest.mark.parametrize(
    ("change", "elements"),
    [({"color": "blue"}, ["product"]), ({"brand": "Ozio"}, ["brand"]), ({"price": 47}, ["units"]), ({"headline": "VIP"}, ["headline"])],
)
def test_changing_a_fact_changes_the_picture_inside_its_box(change, elements, monkeypatch):
    monkeypatch.setattr(cards, "NOISE", 0.0)
    monkeypatch.setattr(cards, "JPEG_QUALITY", (100, 100))
    seed = 5
    before, after = (cards.draw_card(f, np.random.default_rng(seed)) for f in (ONE, replace(ONE, **change)))
    changed = Image.fromarray((np.asarray(ImageChops.difference(before.image, after.image)).max(axis=2) > 60).astype(np.uint8) * 255)
    x0, y0, x1, y1 = changed.getbbox()
    boxes = [card.boxes[element] for card in (before, after) for element in elements]
    assert x0 >= min(b[0] for b in boxes) - 4 and y0 >= min(b[1] for b in boxes) - 4
    assert x1 <= max(b[2] for b in boxes) + 4 and y1 <= max(b[3] for b in boxes) + 4


def test_every_product_has_a_distinct_silhouette():
    small = {p: np.asarray(shape(p).body.resize((24, 24)), dtype=float).ravel() / 255 for p in facts.PRODUCTS}
    for p, a in small.items():
        assert 0.15 < a.mean() < 1.01
        # the difference is at least 2 % of the area, details included
        dark = np.asarray(shape(p).dark.resize((24, 24)), dtype=float).ravel() / 255
        for q in facts.PRODUCTS:
            if p < q:
                other = np.asarray(shape(q).dark.resize((24, 24)), dtype=float).ravel() / 255
                assert np.abs(a - small[q]).mean() + np.abs(dark - other).mean() > 0.02, (p, q)
