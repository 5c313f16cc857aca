"""A demo catalogue in two parts: ads that are known with their users, and new ads that arrive afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmsid.artifacts import read_manifest, read_table, write_json, write_table, writing
from mmsid.catalog.demo.ads import Ad, plan_ads
from mmsid.catalog.demo.users import best_achievable, draw_sequences, draw_user_model
from mmsid.progress import done

SHARE = 0.1  # of the ads that are new


def write_new_ads(catalog: Path, out: Path, share: float = SHARE) -> Path:
    """Write a demo catalogue without its new ads into the new folder `out`, and the requests that are answered after they arrived.

    New is the share of the ads with the lowest hash of seed and id; exact duplicates are new together. Nothing of a new ad is left in
    the known part: neither its row nor an interaction.

    Files: items.parquet and sequences.parquet of the known ads; best_achievable.json for them; requests.parquet (user_id, items: all
    interactions of a user but the last one) and next_items.parquet (user_id, item_id: the last one, is_new).

    Raises:
        ArtifactError: `catalog` is not a folder of `mmsid demo-catalog`, or `out` is finished already.
    """
    drawn = read_manifest(catalog, "demo_catalog")["config"]
    items, users, seed = (drawn[key] for key in ("items", "users", "seed"))
    with writing(Path(out), stage="demo_new_ads", config={"share": share}, inputs={"catalog": Path(catalog)}) as draft:
        ads = plan_ads(items, seed)
        is_known = ~new_ads(ads, seed, share)
        new = {ads[row].item_id for row in np.flatnonzero(~is_known)}
        table = read_table(catalog / "items.parquet")
        write_table(draft.path / "items.parquet", table.filter([item_id not in new for item_id in table["item_id"].to_pylist()]))
        known, requests, targets = [], [], []
        for user in read_table(catalog / "sequences.parquet").to_pylist():
            kept = [(item, time) for item, time in zip(user["items"], user["timestamps"], strict=True) if item not in new]
            last = user["items"][-1]
            known.append(user | {"items": [item for item, _ in kept], "timestamps": [time for _, time in kept]})
            requests.append({name: values if name == "user_id" else values[:-1] for name, values in user.items()})
            targets.append({"user_id": user["user_id"], "item_id": last, "is_new": last in new})
        for name, rows in (("sequences", known), ("requests", requests), ("next_items", targets)):
            write_table(draft.path / f"{name}.parquet", rows)
        model = draw_user_model([ad.facts for ad in ads], users, np.random.default_rng([seed, 2]))
        sequences = draw_sequences(model, np.random.default_rng([seed, 3]))
        write_json(draft.path / "best_achievable.json", best_achievable(model, sequences, is_known))
        draft.counts |= {"items": items, "known": items - len(new), "new": len(new), "users": users}
    done(f"demo: {items - len(new):,} of the ads are known, {len(new):,} will arrive later ({out})")
    return Path(out)


def new_ads(ads: Sequence[Ad], seed: int, share: float) -> np.ndarray:
    """(N,) bool: the share of the ads with the lowest hash of seed and id. A duplicate is where its original is."""
    originals = [ad.duplicate_of or ad.item_id for ad in ads]
    ranked = sorted(set(originals), key=lambda item_id: hashlib.sha256(f"{seed}:{item_id}".encode()).hexdigest())
    chosen = set(ranked[: round(share * len(ranked))])
    return np.array([original in chosen for original in originals])
