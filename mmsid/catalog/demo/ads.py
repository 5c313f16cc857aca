"""Ads of a demo catalogue: ids, facts, texts and creatives.

Each ad has its own random generators, so its texts and pictures depend on the seed and its number only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmsid.catalog.demo.cards import Box, draw_card
from mmsid.catalog.demo.facts import CardFacts, random_facts, texts

SECOND_CREATIVE_SHARE = 0.1
DUPLICATE_SHARE = 0.01


class Ad(NamedTuple):
    """One ad. `number` seeds its pictures. An exact duplicate has the number and all other fields of its original, except the id."""

    item_id: str
    number: int
    facts: CardFacts
    title: str
    description: str
    creatives: int
    duplicate_of: str | None


class Creative(NamedTuple):
    """One picture of an ad: file name, JPEG bytes, and boxes of its elements in px."""

    name: str
    jpeg: bytes
    boxes: dict[str, Box]


def plan_ads(items: int, seed: int) -> list[Ad]:
    """All ads without their pictures. About 10 % have two creatives; about 1 % are exact copies of an earlier ad with another id."""
    ads: list[Ad] = []
    for number in range(items):
        rng = np.random.default_rng([seed, 0, number])
        item_id = "ad_" + hashlib.sha256(f"demo item {seed} {number}".encode()).hexdigest()[:16]
        if ads and rng.random() < DUPLICATE_SHARE:
            original = ads[rng.integers(len(ads))]
            ads.append(original._replace(item_id=item_id, duplicate_of=original.duplicate_of or original.item_id))
            continue
        facts = random_facts(rng)
        title, description = texts(facts, rng)
        ads.append(Ad(item_id, number, facts, title, description, 1 + int(rng.random() < SECOND_CREATIVE_SHARE), None))
    return ads


def draw_creatives(ad: Ad, seed: int) -> list[Creative]:
    """Draw the ad's pictures. They show the same facts with different jitter."""
    creatives = []
    for index in range(ad.creatives):
        card = draw_card(ad.facts, np.random.default_rng([seed, 1, ad.number, index]))
        creatives.append(Creative(f"{ad.item_id}_{index}.jpg", card.jpeg, card.boxes))
    return creatives


class DrawTask(NamedTuple):
    """A batch of ads to draw into `folder`. It is pickled and sent to a worker process."""

    ads: list[Ad]
    seed: int
    folder: Path


def draw_to_files(task: DrawTask) -> list[list[Creative]]:
    """Draw the pictures of a batch and write them to disk. The returned creatives have no bytes."""
    results = []
    for ad in task.ads:
        creatives = draw_creatives(ad, task.seed)
        for creative in creatives:
            (task.folder / creative.name).write_bytes(creative.jpeg)
        results.append([creative._replace(jpeg=b"") for creative in creatives])
    return results
