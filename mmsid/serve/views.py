"""Encoded ads and recommendations as JSON: the answers of the service, and of `mmsid encode --json`."""

from __future__ import annotations

from typing import Any

from mmsid.serve.engine import EncodedAd, Engine


def encoded_view(engine: Engine, one: EncodedAd, k: int, *, pictures: bool = False) -> dict[str, Any]:
    """An encoded ad: texts, codes, the path of the SID in the tree with items that share each prefix, and the k nearest items.

    Args:
        pictures: add thumbnails as data URLs.
    """
    known = engine.known
    (nearest,) = known.nearest(one.embedding[None], k)
    return {
        "item_id": one.ad.item.item_id or None,
        "title": one.ad.item.title,
        "caption": one.texts.caption or None,
        "interests": [{"descriptor": name, "confidence": confidence} for name, confidence in one.texts.interests],
        "summary": one.texts.summary or None,
        "sid": one.sid,
        "codes": one.codes.tolist(),
        "margin": round(one.margin, 4),
        "path": [
            {"token": token, "items": count, "examples": [known.card(row, picture=pictures) for row in rows]}
            for token, count, rows in known.path(one.codes, one.embedding)
        ],
        "nearest": [known.card(row, picture=pictures) | {"similarity": round(similarity, 4)} for row, similarity in nearest],
        "notes": [*dict.fromkeys([*one.texts.notes, *engine.notes])],
    }


def recommended_view(engine: Engine, found: dict[str, Any], *, pictures: bool = False) -> dict[str, Any]:
    """Recommendations of one history, best first, each with its score and the sources that proposed it."""
    items = [
        engine.known.card(one["row"], picture=pictures) | {"score": round(float(one["score"]), 4), "sources": one["sources"]}
        for one in found["items"]
    ]
    return {"status": found["status"], "unknown_ids": found["unknown_ids"], "items": items}


def item_view(engine: Engine, item_id: str, *, pictures: bool = False) -> dict[str, Any] | None:
    """One known item, None if there is no such id."""
    row = engine.known.row_of.get(item_id)
    return None if row is None else engine.known.card(row, picture=pictures)
