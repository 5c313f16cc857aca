"""Which columns of a log hold users, items, times, types and weights: those of the configuration, or common names of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mmsid.catalog.columns import Columns, read_columns
from mmsid.catalog.config import CatalogConfig, Fields
from mmsid.catalog.sources.locate import Source
from mmsid.errors import CatalogError

_OTHER_ITEMS = (
    *("item", "iid", "movieid", "productid", "asin", "adid", "articleid", "newsid", "videoid", "trackid", "songid", "bookid", "isbn"),
    *("gameid", "sku", "goodsid", "contentid", "creativeid", "businessid", "listingid", "offerid"),
)
# common names of each field, in lower case without punctuation; a name of an earlier group is preferred
_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "user_id": (
        ("userid",),
        ("user", "uid", "visitorid", "reviewerid", "customerid", "memberid", "profileid", "clientid", "cookieid", "deviceid"),
        ("sessionid",),
    ),
    "event_item": (
        ("itemid",),
        ("parentasin",),
        _OTHER_ITEMS,
    ),
    "event_time": (
        ("timestamp",),
        ("unixreviewtime", "unixtime", "unixtimestamp"),
        ("time", "ts", "eventtime", "eventtimestamp", "timestampms", "datetime", "createdat", "servertime"),
        ("date", "reviewtime", "eventdate", "day"),
    ),
    "event_type": (("eventtype",), ("event", "behaviortype", "behavior", "action", "actiontype", "interactiontype")),
    "event_weight": (("weight",), ("eventweight",)),
    "sequence": (
        ("items",),
        ("itemids", "itemidlist", "itemlist", "itemsequence", "itemhistory", "sequence", "history", "interactions"),
    ),
}
_RECBOLE = re.compile(r":(token|float)(_seq)?$")
_EVENT = ("user_id", "event_item", "event_time")
_DEFAULTS = ("user_id", "sequence", "timestamps", "event_item", "event_time", "event_type", "event_weight")


class LogColumns(NamedTuple):
    """A log, and the column of each field. A log of one row per user has `sequence`, one of one row per event has `item`."""

    columns: Columns
    user: str
    sequence: str | None = None
    item: str | None = None
    time: str | None = None
    type: str | None = None
    weight: str | None = None


def open_log(config: CatalogConfig, notes: list[str]) -> LogColumns:
    """Read the columns of `config.sequences` or `config.events` that the histories are made of.

    Column names of the configuration that the user has set must exist. Instead of an absent default, a column of a common name is
    used, and a table of the other form than its key says is read as what it is. Both are said in `notes`.

    Raises:
        CatalogError: the table is unreadable, a column is absent, or several columns could be meant.
    """
    key = "sequences" if config.events is None else "events"
    source, fields = getattr(config, key), config.fields
    usual = [name for field in _DEFAULTS if (name := getattr(fields, field)) is not None]
    first = read_columns(source, usual, config_key=f"catalog.{key}")
    finder = _Finder(first, config)
    per_user = finder.is_per_user(key)
    found = finder.per_user(key) if per_user else finder.per_event(key)
    wanted = [name for name in found.values() if name is not None]
    columns = first if set(wanted) <= set(first.table.column_names) else read_columns(source, wanted, config_key=f"catalog.{key}")
    notes += [*columns.notes, *finder.notes]
    unread = [name for name in first.names if name not in wanted]
    if unread:
        notes.append(f"{first.path}: not read: {', '.join(unread)}{_advice(unread, per_user, config)}")
    return LogColumns(columns, **found)


def sequence_fields(source: Source, config: CatalogConfig, config_key: str) -> Fields:
    """The fields of a table with one row per user, with its columns of common names instead of absent defaults.

    Raises:
        CatalogError: the table is unreadable, a column is absent, or several columns could be meant.
    """
    finder = _Finder(read_columns(source, [], config_key=config_key), config)
    found = {field: finder.find(field, required=True) for field in ("user_id", "sequence")}
    return config.fields.model_copy(update=found)


def _advice(unread: Iterable[str], per_user: bool, config: CatalogConfig) -> str:
    """What a person may want to set for columns that are not read."""
    named = {_plain(name): name for name in unread}
    if per_user and config.fields.timestamps is None and (name := next((named[n] for n in ("timestamps", "times") if n in named), None)):
        return f" (set catalog.fields.timestamps: {name} to use the times)"
    if not per_user and "rating" in named:
        return f" (set catalog.fields.event_weight: {named['rating']} to weight each event by it)"
    return ""


class _Finder:
    """Finds the columns of one table."""

    def __init__(self, columns: Columns, config: CatalogConfig) -> None:
        self.columns, self.config, self.fields = columns, config, config.fields
        self.names: Sequence[str] = list(columns.names)
        self.notes: list[str] = []

    def is_per_user(self, key: str) -> bool:
        """Whether the table has one row per user. It is of the form that its key says, unless only the other form fits."""
        sequence = self.find("sequence", required=False) is not None
        events = all(self.find(field, required=False) is not None for field in _EVENT[1:])
        if key == "sequences":
            return sequence or not events or bool(self.fields.model_fields_set & {"sequence", "timestamps"})
        set_by_user = self.fields.model_fields_set & {"event_item", "event_time", "event_type", "event_weight"}
        return sequence and self.find("event_item", required=False) is None and not set_by_user and not self.config.event_types

    def per_user(self, key: str) -> dict[str, str | None]:
        """Columns of a table with one row per user."""
        time = self.fields.timestamps
        if time is not None:
            self._require("timestamps", time)
        if key == "events":
            times = [name for name in self.names if _plain(name) in ("timestamps", "times")]
            time = time or (times[0] if len(times) == 1 else self.find("event_time", required=False))
            self.notes.append(f"{self.columns.path}: catalog.events holds one row per user; it is read like catalog.sequences")
        return {"user": self._named("user_id"), "sequence": self._named("sequence", key), "time": time}

    def per_event(self, key: str) -> dict[str, str | None]:
        """Columns of a table with one row per event."""
        if key == "sequences":
            self.notes.append(f"{self.columns.path}: catalog.sequences holds one row per event; it is read like catalog.events")
        found = {"user": self._named("user_id"), "item": self._named("event_item", key), "time": self._named("event_time", key)}
        set_by_user = "event_type" in self.fields.model_fields_set
        types = self._named("event_type") if self.config.event_types else self.find("event_type", required=set_by_user)
        weight = self.find("event_weight", required="event_weight" in self.fields.model_fields_set)
        return found | {"type": types, "weight": weight}

    def _named(self, field: str, key: str | None = None) -> str:
        """The column of a field that the table must have; a common name that is used is noted."""
        name = self.find(field, required=True, key=key)
        if name != getattr(self.fields, field):
            self.notes.append(f"{self.columns.path}: column {name!r} is used as catalog.fields.{field}")
        return name

    def find(self, field: str, *, required: bool, key: str | None = None) -> str | None:
        """The column of a field; None if there is none, or, unless it is required, if several could be meant."""
        default = getattr(self.fields, field)
        if default in self.names:
            return default
        if field not in self.fields.model_fields_set:
            groups = _NAMES[field]
            if field == "event_item":
                groups = ((_plain(self.fields.group_by or self.fields.item_id),), *groups)
            for group in groups:
                candidates = [name for name in self.names if _plain(name) in group]
                if len(candidates) == 1:
                    return candidates[0]
                if candidates and not required:
                    return None
                if candidates:
                    raise CatalogError(
                        f"{self.columns.path}: no column {default!r}, and {' or '.join(map(repr, candidates))} may be meant; "
                        f"set catalog.fields.{field} to one of them"
                    )
        return self._require(field, default, key) if required else None

    def _require(self, field: str, column: str, key: str | None = None) -> str:
        if column not in self.names:
            found = ", ".join(self.names)
            form = {"sequences": "one row per user with the list of items", "events": "one row per event with item and time"}.get(key)
            expected = f", catalog.{key} needs {form}" if form else ""
            raise CatalogError(
                f"{self.columns.path}: no column {column!r} (catalog.fields.{field}){expected}; found: {found}; correct the mapping or add "
                "the column"
            )
        return column


def _plain(name: str) -> str:
    """A column name in lower case, without punctuation and without the type that RecBole appends: `user_id:token` is `userid`."""
    return re.sub(r"[^0-9a-z]", "", _RECBOLE.sub("", name.strip().lower()))
