"""Data sets of the Hugging Face hub, and folders that `datasets.save_to_disk` wrote. Pictures stay structs of bytes and path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmsid.catalog.sources.batch import Batch, stripped_header
from mmsid.catalog.sources.columnar import batches_of
from mmsid.errors import CatalogError

PREFIX = "hf:"


def saved_files(folder: Path) -> tuple[list[Path], str] | None:
    """Arrow files of a folder that `save_to_disk` wrote and one sentence about its splits, or None for other folders.

    Raises:
        CatalogError: a file of the data set is missing or damaged.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            files = [file for split in splits for file in _shards(folder / split)]
            return files, f"a saved data set, all splits: {', '.join(splits)}"
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            return _shards(folder), "a saved data set"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CatalogError(f"{folder} is no whole data set of `save_to_disk` ({type(error).__name__}: {error}); save it again") from error
    return None


def _shards(folder: Path) -> list[Path]:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / entry["filename"] for entry in state["_data_files"]]


class HubSplit:
    """One split of a hub data set. `TableFile` describes the attributes; `path` is the name of the data set."""

    format = "data set"

    def __init__(self, name: str, dataset: Any) -> None:
        self.path, self._table, self.notes = Path(name), dataset.data.table, []
        self._names = stripped_header(self.path, self._table.column_names)
        self.columns, self.num_rows = tuple(self._names), self._table.num_rows
        self.empty = not self.num_rows
        self.files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)

    def batches(self, selected: Sequence[str], rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` rows with the `selected` columns that exist."""
        kept = {name: self._names[name] for name in selected if name in self._names}
        yield from batches_of(iter(self._table.to_batches()), kept, self.path, rows)


def open_hub(source: str, config_key: str) -> tuple[list[HubSplit], str]:
    """The splits of `hf:OWNER/NAME[:SPLIT]`, downloaded into the cache of `datasets`, and one sentence about them.

    Raises:
        CatalogError: the name is not of this form, or the data set cannot be loaded.
    """
    name, _, split = source.removeprefix(PREFIX).partition(":")
    if not name or name.startswith("/") or name.count("/") > 1:
        raise CatalogError(f"{config_key}: {source!r} names no data set; write hf:OWNER/NAME or hf:OWNER/NAME:SPLIT")
    import datasets

    try:
        found = datasets.load_dataset(name, split=split or None, streaming=False)
    except Exception as error:  # the library raises errors of many packages
        reason = str(error).strip().partition("\n")[0]
        raise CatalogError(
            f"{config_key}: {source} cannot be loaded ({type(error).__name__}: {reason}); check the name, the split and the network, "
            "or name a folder that datasets.save_to_disk wrote"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        return [HubSplit(f"{PREFIX}{name}:{key}", part) for key, part in found.items()], f"all splits: {', '.join(found)}"
    return [HubSplit(source, found)], ""
