"""Columns of a user log: who, what, when, and what kind of event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmsid.catalog.fields.presets import normal_name
from mmsid.catalog.proposal.samples import Sample

_USERS = (
    "user_id user uid userid visitor_id visitorid reviewer_id reviewerid customer_id customerid member_id profile_id client_id session_id"
)
_ITEMS = (
    "item_id itemid product_id productid parent_asin asin movie_id movieid ad_id sku article_id news_id video_id track_id offer_id item iid"
)
_TIMES = "timestamp timestamps times time ts event_time event_timestamp unix_review_time datetime created_at date server_time"
_TYPES = "event_type event type behavior behavior_type action action_type interaction_type"
_WEIGHTS = "weight event_weight"
_SEQUENCES = "items item_ids item_id_list item_list sequence history item_sequence interactions"
_SEPARATORS = ("|", " ", ",", ";", "\t")


@dataclass(frozen=True)
class LogRoles:
    """Columns of a log. A log with one row per user has `sequence`, one with one row per event has `item`.

    Attributes:
        types: the types of events in the first rows.
        separator: separator of the ids in a sequence, None when the cells are lists.
    """

    user: str
    item: str | None = None
    sequence: str | None = None
    time: str | None = None
    type: str | None = None
    weight: str | None = None
    types: tuple[str, ...] = ()


def log_roles(sample: Sample) -> LogRoles | None:
    """The columns of a log, or None when the table is no log."""
    user = _first(sample, _USERS)
    if user is None:
        return None
    time = _first(sample, _TIMES)
    sequence = _first(sample, _SEQUENCES)
    if sequence is not None and max(map(len, split_ids(sample, sequence)), default=0) > 1:
        return LogRoles(user, sequence=sequence, time=time)
    item = _first(sample, _ITEMS)
    if item is None:
        return None
    kind = _first(sample, _TYPES)
    types = tuple(sorted({text for texts in sample.texts(kind) for text in texts})) if kind else ()
    return LogRoles(user, item=item, time=time, type=kind if 0 < len(types) <= 50 else None, weight=_first(sample, _WEIGHTS), types=types)


def split_ids(sample: Sample, column: str) -> Sequence[Sequence[str]]:
    """Ids of each row of a sequence column, split by the separator that gives the most of them."""
    return max((sample.texts(column, separator) for separator in _SEPARATORS), key=lambda lists: sum(map(len, lists)))


def logged_ids(sample: Sample, roles: LogRoles) -> list[str]:
    """Item ids in the first rows of a log."""
    lists = split_ids(sample, roles.sequence) if roles.sequence is not None else sample.texts(roles.item)
    return [item for items in lists for item in items]


def _first(sample: Sample, names: str) -> str | None:
    by_name: dict[str, str] = {}
    for column in sample.table.columns:
        name = column.strip().partition(":")[0] if column.strip().endswith((":token", ":token_seq", ":float")) else column
        by_name.setdefault(normal_name(name).replace("_", ""), column)
    return next((by_name[name.replace("_", "")] for name in names.split() if name.replace("_", "") in by_name), None)
