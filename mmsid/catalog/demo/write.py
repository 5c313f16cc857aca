"""Writer of the demo catalogue: pictures, tables, true facts, true users and the best achievable ranking."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mmsid.artifacts import write_json, write_table, writing
from mmsid.catalog.demo.ads import Ad, Creative, DrawTask, draw_to_files, plan_ads
from mmsid.catalog.demo.facts import caption, held_out, interests
from mmsid.catalog.demo.readme import readme
from mmsid.catalog.demo.users import MIN_ITEMS, Sequences, UserModel, best_achievable, draw_sequences, draw_user_model
from mmsid.errors import ConfigError
from mmsid.progress import done, track

_START = 1_700_000_000  # unix seconds of the first interactions
_DAY = 86_400


def write_demo_catalog(out: Path, items: int, users: int, seed: int, workers: int = 1) -> Path:
    """Draw a catalogue of `items` ads and the sequences of `users` users into the new folder `out`.

    Data files have the same bytes for the same (items, users, seed) and any number of `workers`. Only `manifest.json` contains
    times. Rendering processes need seconds to start, so several `workers` are faster from about ten thousand ads on. The first n ads
    of two catalogues with the same seed show the same facts.

    Files: items.parquet (item_id, title, description, image, categories, attributes), images/, sequences.parquet (user_id, items,
    timestamps; absent without users), truth.parquet and truth_users.parquet (for scoring; no stage reads them), best_achievable.json,
    README.md.

    Returns:
        `out`.

    Raises:
        ConfigError: no items, a negative number, or too few items for sequences.
        ArtifactError: `out` is finished already or contains other files.
    """
    _check(items, users, seed, workers)
    config = {"items": items, "users": users, "seed": seed}
    with writing(Path(out), stage="demo_catalog", config=config) as draft:
        ads = plan_ads(items, seed)
        creatives = _render(ads, seed, draft.path / "images", workers)
        order = sorted(range(items), key=lambda row: ads[row].item_id)
        write_table(draft.path / "items.parquet", [_item_row(ads[row], creatives[row]) for row in order])
        write_table(draft.path / "truth.parquet", [_truth_row(ads[row], creatives[row]) for row in order])
        best = None
        if users:
            model = draw_user_model([ad.facts for ad in ads], users, np.random.default_rng([seed, 2]))
            sequences = draw_sequences(model, np.random.default_rng([seed, 3]))
            best = best_achievable(model, sequences)
            write_json(draft.path / "best_achievable.json", {"items": items, "users": users, "seed": seed, **best})
            rows, truth = _user_rows(model, sequences, [ad.item_id for ad in ads], seed)
            write_table(draft.path / "sequences.parquet", rows)
            write_table(draft.path / "truth_users.parquet", truth)
        (draft.path / "README.md").write_text(readme(items, users, seed, best), encoding="utf-8")
        pictures = sum(map(len, creatives))
        draft.counts.update({"items": items, "pictures": pictures, "users": users})
    done(f"demo-catalog: wrote {items:,} ads with {pictures:,} pictures and {users:,} users to {out}")
    return Path(out)


def _check(items: int, users: int, seed: int, workers: int) -> None:
    for name, value, least in (("items", items, 1), ("users", users, 0), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise ConfigError(f"demo-catalog: {name} is {value}, the minimum is {least}; give a larger --{name}")
    if users and items < MIN_ITEMS:
        raise ConfigError(
            f"demo-catalog: {items} items are too few for sequences without repeats, the minimum is {MIN_ITEMS}; "
            f"give --items {MIN_ITEMS} or more, or --users 0"
        )


def _render(ads: list[Ad], seed: int, folder: Path, workers: int) -> list[list[Creative]]:
    """Draw the creatives of every ad into `folder`. Returns them in the order of `ads`, without their bytes."""
    folder.mkdir()
    size = 16
    tasks = [DrawTask(ads[start : start + size], seed, folder) for start in range(0, len(ads), size)]
    with _mapper(workers) as mapper:
        batches = list(track(mapper(draw_to_files, tasks), "demo-catalog", total=len(tasks), unit=f"x {size} ads"))
    return [creatives for batch in batches for creatives in batch]


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator:
    if workers == 1:
        yield map
        return
    # spawn, because a forked copy of a process whose torch threads hold locks can deadlock
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _item_row(ad: Ad, creatives: list[Creative]) -> dict:
    return {
        "item_id": ad.item_id,
        "title": ad.title,
        "description": ad.description,
        "image": [f"images/{creative.name}" for creative in creatives],
        "categories": list(ad.facts.categories),
        "attributes": {"material": ad.facts.material, "season": ad.facts.season, "collection": ad.facts.collection},
    }


def _truth_row(ad: Ad, creatives: list[Creative]) -> dict:
    boxes = [{element: [round(float(v), 2) for v in box] for element, box in creative.boxes.items()} for creative in creatives]
    return {
        "item_id": ad.item_id,
        **asdict(ad.facts),
        "price_tier": ad.facts.price_tier,
        "boxes": json.dumps(boxes),
        "caption": caption(ad.facts),
        "interests": json.dumps(interests(ad.facts)),
        "held_out": held_out(ad.facts),
        "duplicate_of": ad.duplicate_of or "",
    }


def _user_rows(model: UserModel, sequences: Sequences, item_ids: list[str], seed: int) -> tuple[list[dict], list[dict]]:
    rng = np.random.default_rng([seed, 4])
    steps = sequences.items.shape[1]
    starts = _START + rng.integers(0, 90 * _DAY, len(sequences.items))
    gaps = 60 + rng.exponential(2 * _DAY, (len(sequences.items), steps)).astype(np.int64)
    times = starts[:, None] + gaps.cumsum(axis=1)
    rows, truth = [], []
    for user, length in enumerate(sequences.lengths):
        user_id = "u_" + hashlib.sha256(f"demo user {seed} {user}".encode()).hexdigest()[:12]
        items = [item_ids[row] for row in sequences.items[user, :length]]
        rows.append({"user_id": user_id, "items": items, "timestamps": times[user, :length].tolist()})
        interests_of_user = [model.interests[member] for member in model.members[user]]
        truth.append(
            {
                "user_id": user_id,
                "interests": [str(interest) for interest in interests_of_user],
                "kinds": [interest.kind for interest in interests_of_user],
                "weights": model.weights[user].tolist(),
                "active": sequences.active[user, :length].tolist(),
            }
        )
    order = sorted(range(len(rows)), key=lambda user: rows[user]["user_id"])
    return [rows[user] for user in order], [truth[user] for user in order]
