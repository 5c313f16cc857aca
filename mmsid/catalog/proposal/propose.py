"""Proposal of a catalogue configuration: which table holds the items, which one the logs, and what each column is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmsid.catalog.config import Fields
from mmsid.catalog.fields import FieldMapping, resolve_mapping
from mmsid.catalog.fields.column_names import common_candidates
from mmsid.catalog.proposal.column_roles import ColumnFacts, column_facts, level_columns, reason_against_attribute
from mmsid.catalog.proposal.log_roles import LogRoles, log_roles, logged_ids
from mmsid.catalog.proposal.picture_folder import picture_root
from mmsid.catalog.proposal.samples import Sample, all_texts, find_samples
from mmsid.catalog.sources import Source
from mmsid.catalog.sources.locate import folder_of, is_hub
from mmsid.errors import CatalogError

_FIELDS = ("title", "description", "image", "categories", "attributes")
_LEAST_OVERLAP = 0.5  # share of the logged item ids that must be among the items


@dataclass
class Proposal:
    """What was understood of a catalogue.

    Attributes:
        items: source of the items.
        mapping: columns of the fields.
        num_items: number of distinct ids.
        logs: source of the user log, or None, and its columns.
        overlap: share of the log's first item ids that are among the items.
        image_root: folder of the pictures, None for the folder of the items.
        columns: (column, role, facts) of the items table.
        unused: what is not used and why, one line each.
        notes: further facts, one line each.
    """

    items: Source | tuple[Source, ...]
    mapping: FieldMapping
    num_items: int
    logs: Source | tuple[Source, ...] | None = None
    roles: LogRoles | None = None
    overlap: float = 0.0
    image_root: Path | None = None
    columns: list[tuple[str, str, ColumnFacts]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def propose(sources: Sequence[str], events: str | None = None) -> Proposal:
    """Look at files, folders, patterns or hub ids, and propose how to read them as a catalogue.

    Args:
        sources: where the items are, and perhaps the logs and pictures.
        events: the table of the logs, when it is not among `sources`.

    Raises:
        CatalogError: no source can be read, no table holds items, or no column is an id.
    """
    samples, unused = find_samples(sources)
    logs = [(sample, roles) for sample in samples if (roles := log_roles(sample)) is not None]
    if events is not None:
        sample = Sample.of(events if is_hub(events) else Path(events))
        roles = log_roles(sample)
        if roles is None:
            raise CatalogError(
                f"{events}: no columns of users and items are told; found: {', '.join(sample.table.columns)}; name them user_id and item_id"
            )
        logs = [(sample, roles)]
    logged = {item for sample, roles in logs for item in logged_ids(sample, roles)}
    without_logs = [sample for sample in samples if all(sample is not log for log, _ in logs)]
    if not without_logs:
        raise CatalogError(f"no table of items was found in {', '.join(sources)}, only logs of users; name the file of the items as well")
    refused = []
    proposals = []
    for sample in without_logs:
        try:
            proposals.append((sample, _items_proposal(sample, logged)))
        except CatalogError as error:
            refused.append(str(error))
    if not proposals:
        raise CatalogError(refused[0])
    sample, proposal = max(proposals, key=lambda found: _content(found[1]))
    proposal.unused += [
        *unused,
        *refused,
        *(f"{other.table.name}: another table of items" for other, _ in proposals if other is not sample),
    ]
    _add_logs(proposal, sample, logs)
    references = [text for column in proposal.mapping.image for texts in sample.texts(column) for text in texts]
    folders = [Path(source) for source in sources if Path(source).is_dir()]
    proposal.image_root, said = picture_root(references, folder_of(proposal.items), folders)
    proposal.notes += [said] if said else []
    return proposal


def _content(proposal: Proposal) -> tuple[float, int, int]:
    return proposal.overlap, sum(bool(getattr(proposal.mapping, name)) for name in _FIELDS), proposal.num_items


def _items_proposal(sample: Sample, logged: set[str]) -> Proposal:
    chosen = _chosen_columns(sample, logged)
    mapping = resolve_mapping(sample.table, Fields(**chosen), "catalog.items")
    if not mapping.categories and (levels := level_columns(mapping.not_read)):
        chosen["categories"] = levels
        mapping = resolve_mapping(sample.table, Fields(**chosen), "catalog.items")
    notes = list(mapping.notes)
    against = {name: reason_against_attribute(sample, name) for name in mapping.not_read}
    labels = [name for name in mapping.not_read if against[name] is None]
    if labels:
        chosen["attributes"] = [*mapping.attributes, *labels]
    id_column = mapping.group_by or mapping.item_id
    ids = all_texts(sample.table, id_column)
    counts = Counter(ids)
    if not counts:
        raise CatalogError(f"{sample.table.name}: the id column {id_column!r} is empty; name the column of the ids item_id")
    if mapping.group_by is None and len(counts) < len(ids):
        chosen["group_by"] = mapping.item_id
        doubled, times = counts.most_common(1)[0]
        notes.append(f"{mapping.item_id} {doubled!r} occurs {times} times: rows of one id are read as creatives of one item (group_by)")
    mapping = resolve_mapping(sample.table, Fields(**chosen), "catalog.items")
    roles = {name: role for role in (*_FIELDS, "item_id", "group_by") for name in _as_tuple(getattr(mapping, role))}
    columns = [(name, roles.get(name, "-"), column_facts(sample, name)) for name in sample.table.columns]
    unused = [f"column {name}: {reason}" for name, reason in against.items() if reason is not None]
    overlap = sum(item in counts for item in logged) / len(logged) if logged else 0.0
    return Proposal(
        sample.source, mapping, len(counts), overlap=overlap, columns=columns, unused=unused, notes=[*sample.table.notes, *notes]
    )


def _chosen_columns(sample: Sample, logged: set[str]) -> dict[str, Any]:
    """Columns of fields where several have a common name, and the id column where none has."""
    chosen: dict[str, Any] = {}
    columns = sample.table.columns
    for name in ("item_id", "title", "description", "image", "categories"):
        candidates = common_candidates(name, columns)
        if len(candidates) > 1 and getattr(Fields(), name) not in columns:
            chosen[name] = next((column for column in candidates if name != "item_id" or _are_ids(sample, column)), candidates[0])
    if len(set(chosen.values())) < len(chosen):
        raise CatalogError(
            f"{sample.table.name}: columns {', '.join(columns)} cannot be told apart; rename them as docs/catalogues.md says"
        )
    try:
        resolve_mapping(sample.table, Fields(**chosen), "catalog.items")
    except CatalogError as error:
        ids = [column for column in columns if _are_ids(sample, column)]
        known = [column for column in ids if logged and logged & set(all_texts(sample.table, column))]
        named = [column for column in ids if column.lower().strip().endswith(("id", "key", "no", "number", "code"))]
        if not (known or named):
            raise CatalogError(
                f"{sample.table.name}: no id column can be told; found: {', '.join(columns)}; no column has a common name of an id, "
                "or an id in its name and one value per row; name the id column item_id"
            ) from error
        chosen["item_id"] = (known or named)[0]
    return chosen


def _are_ids(sample: Sample, column: str) -> bool:
    """Whether each of the first rows has one short value, and all differ."""
    lists = sample.texts(column, "\0")
    values = [texts[0] for texts in lists if len(texts) == 1 and len(texts[0]) <= 100]
    return len(values) == len(lists) == len(set(values)) > 0


def _add_logs(proposal: Proposal, items: Sample, logs: Sequence[tuple[Sample, LogRoles]]) -> None:
    if not logs:
        return
    known = set(all_texts(items.table, proposal.mapping.group_by or proposal.mapping.item_id))
    scored = []
    for sample, roles in logs:
        logged = logged_ids(sample, roles)
        share = sum(item in known for item in logged) / max(1, len(logged))
        usable = roles.sequence is not None or roles.time is not None
        if share < _LEAST_OVERLAP:
            unknown = next((item for item in logged if item not in known), "")
            proposal.unused.append(
                f"{sample.table.name}: a log of which {100 * share:.0f} % of the item ids are among the items (for example not {unknown!r})"
            )
        elif not usable:
            proposal.unused.append(f"{sample.table.name}: a log without times; name its time column timestamp")
        else:
            scored.append((share, sample.table.num_rows or 0, sample, roles))
    if not scored:
        return
    proposal.overlap, _, sample, proposal.roles = max(scored, key=lambda found: found[:2])
    proposal.logs = sample.source
    proposal.unused += [f"{other.table.name}: another log" for _, _, other, _ in scored if other is not sample]
    used = {
        proposal.roles.user,
        proposal.roles.item,
        proposal.roles.sequence,
        proposal.roles.time,
        proposal.roles.type,
        proposal.roles.weight,
    }
    proposal.unused += [f"column {name} of {sample.table.name}" for name in sample.table.columns if name not in used]


def _as_tuple(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
