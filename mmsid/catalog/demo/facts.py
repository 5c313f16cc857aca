"""Facts of demo ads, and the caption, interests and texts that follow from them.

A card shows product, colour, pattern, brand badge, price tag and headline. Material, season and collection occur in title, description and
attributes only. Caption and interests are functions of the facts that the picture shows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

# product -> (level 1, level 2); the product is level 3
_TREE = {
    "running shoe": ("fashion", "footwear"),
    "boot": ("fashion", "footwear"),
    "sandal": ("fashion", "footwear"),
    "t-shirt": ("fashion", "clothing"),
    "dress": ("fashion", "clothing"),
    "watch": ("fashion", "accessories"),
    "handbag": ("fashion", "accessories"),
    "cap": ("fashion", "accessories"),
    "armchair": ("home", "furniture"),
    "chair": ("home", "furniture"),
    "table": ("home", "furniture"),
    "lamp": ("home", "lighting"),
    "candle": ("home", "lighting"),
    "mug": ("home", "kitchen"),
    "bottle": ("home", "kitchen"),
    "pan": ("home", "kitchen"),
    "headset": ("tech", "audio"),
    "speaker": ("tech", "audio"),
    "music player": ("tech", "audio"),
    "laptop": ("tech", "devices"),
    "camera": ("tech", "devices"),
    "bicycle": ("leisure", "outdoors"),
    "tent": ("leisure", "outdoors"),
    "guitar": ("leisure", "hobbies"),
}
PRODUCTS: tuple[str, ...] = tuple(_TREE)
CATEGORIES: dict[str, tuple[str, str, str]] = {product: (*path, product) for product, path in _TREE.items()}
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
BRANDS: tuple[str, ...] = ("Velo", "Lumo", "Pexa", "Zento", "Norra", "Kavo", "Rilo", "Ozio")
HEADLINES: tuple[str, ...] = ("SALE", "NEW", "BEST", "HOT", "DEAL", "TOP", "FREE", "ECO", "VIP", "LAST", "GIFT", "PLUS")
PRICES = range(10, 100)
MATERIALS: tuple[str, ...] = ("leather", "canvas", "bamboo", "steel", "wool", "cork")
SEASONS: tuple[str, ...] = ("spring", "summer", "autumn", "winter")
COLLECTIONS: tuple[str, ...] = ("Harbour", "Meadow", "Atlas", "Studio", "Nomad", "Heritage")

PICTURE_FIELDS: tuple[str, ...] = ("color", "pattern", "product", "brand", "price", "headline")  # fields that a caption contains
PRICE_TIERS: tuple[str, ...] = ("budget", "middle", "premium")

HELD_OUT_SHARE = 0.15

_NEED = {
    "running shoe": "daily running",
    "boot": "long walks",
    "sandal": "beach days",
    "t-shirt": "casual wear",
    "dress": "evenings out",
    "watch": "keeping time",
    "handbag": "city errands",
    "cap": "sunny days",
    "armchair": "slow evenings",
    "chair": "desk work",
    "table": "dinner guests",
    "lamp": "late reading",
    "candle": "cosy nights",
    "mug": "coffee breaks",
    "bottle": "drinks to go",
    "pan": "home cooking",
    "headset": "focused work",
    "speaker": "house parties",
    "music player": "commuting",
    "laptop": "study and work",
    "camera": "travel photos",
    "bicycle": "cycling",
    "tent": "camping trips",
    "guitar": "making music",
}
_MOOD = {
    "red": "bold",
    "orange": "warm",
    "yellow": "sunny",
    "green": "fresh",
    "blue": "calm",
    "purple": "rich",
    "black": "sleek",
    "white": "airy",
}
_STYLE = {"plain": "minimal", "striped": "sporty", "dotted": "playful", "checkered": "retro"}
_BUYER = {"budget": "bargain hunters", "middle": "practical buyers", "premium": "quality lovers"}
_NEED_CONFIDENCE = 0.9
_STYLE_CONFIDENCE = {"plain": 0.6, "striped": 0.7, "dotted": 0.8, "checkered": 0.7}
_BUYER_CONFIDENCE = {"budget": 0.8, "middle": 0.5, "premium": 0.7}


@dataclass(frozen=True)
class CardFacts:
    """All facts of one ad. The picture shows the first six, and the texts contain the last three."""

    product: str
    color: str
    pattern: str
    brand: str
    price: int
    headline: str
    material: str
    season: str
    collection: str

    @property
    def categories(self) -> tuple[str, str, str]:
        """Category path from root to leaf. The leaf is the product."""
        return CATEGORIES[self.product]

    @property
    def price_tier(self) -> str:
        """`budget` (10-39), `middle` (40-69) or `premium` (70-99)."""
        return PRICE_TIERS[(self.price - 10) // 30]


def random_facts(rng: np.random.Generator, held_out_triples: bool | None = None) -> CardFacts:
    """Draw every fact uniformly and independently.

    Args:
        held_out_triples: True draws held-out combinations only (see `held_out`), False the others only, None both.
    """
    while True:
        facts = CardFacts(
            product=PRODUCTS[rng.integers(len(PRODUCTS))],
            color=COLORS[rng.integers(len(COLORS))],
            pattern=PATTERNS[rng.integers(len(PATTERNS))],
            brand=BRANDS[rng.integers(len(BRANDS))],
            price=PRICES[rng.integers(len(PRICES))],
            headline=HEADLINES[rng.integers(len(HEADLINES))],
            material=MATERIALS[rng.integers(len(MATERIALS))],
            season=SEASONS[rng.integers(len(SEASONS))],
            collection=COLLECTIONS[rng.integers(len(COLLECTIONS))],
        )
        if held_out_triples is None or held_out(facts) == held_out_triples:
            return facts


def held_out(facts: CardFacts) -> bool:
    """Whether the (product, colour, pattern) triple is one of the 15 % on which no captioner may be trained."""
    digest = hashlib.sha256(f"{facts.product}|{facts.color}|{facts.pattern}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def caption(facts: CardFacts) -> str:
    """True caption of a card, for example "a red striped running shoe by Velo, priced 49, headline SALE"."""
    article = "an" if facts.color[0] in "aeiou" else "a"
    return f"{article} {facts.color} {facts.pattern} {facts.product} by {facts.brand}, priced {facts.price}, headline {facts.headline}"


def interests(facts: CardFacts) -> dict:
    """True interests of an ad, from product (need), colour and pattern (taste) and price tier (kind of buyer).

    The result has three descriptors with confidences and one summary. Its JSON has at most 256 characters, because a very small
    language model has to generate it. The vocabulary contains no sensitive attributes of people.
    """
    need, buyer = _NEED[facts.product], _BUYER[facts.price_tier]
    taste = f"{_MOOD[facts.color]} {_STYLE[facts.pattern]} taste"
    return {
        "descriptors": [
            {"descriptor": need, "confidence": _NEED_CONFIDENCE},
            {"descriptor": taste, "confidence": _STYLE_CONFIDENCE[facts.pattern]},
            {"descriptor": buyer, "confidence": _BUYER_CONFIDENCE[facts.price_tier]},
        ],
        "summary": f"{need} for {buyer} of {taste}",
    }


_TITLES = (
    "{Season} {group} with {material} details",
    "{collection} {group}, {material} finish",
    "{group} for {season} in {material}",
    "The {collection} {season} {group}",
)
_DESCRIPTIONS = (
    "From the {collection} collection: {group} made for {season}, finished with {material}.",
    "{Group} with a touch of {material}. Part of {collection}, our {season} range.",
    "Designed for {season} days: {material} parts, {collection} collection, {group} department.",
    "{collection} brings {material} to your {season}, now in {group}.",
)


def texts(facts: CardFacts, rng: np.random.Generator) -> tuple[str, str]:
    """Title and description. They contain category group, material, season and collection, and no fact that the picture shows."""
    group = facts.categories[1]
    words = {
        "group": group,
        "Group": group.capitalize(),
        "season": facts.season,
        "Season": facts.season.capitalize(),
        "material": facts.material,
        "collection": facts.collection,
    }
    title = _TITLES[rng.integers(len(_TITLES))].format(**words)
    description = _DESCRIPTIONS[rng.integers(len(_DESCRIPTIONS))].format(**words)
    return title[0].upper() + title[1:], description[0].upper() + description[1:]
