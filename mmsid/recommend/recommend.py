"""Stage `recommend`: the best k items for every user, written as parquet shards.

The stage reads the whole history of a user and holds nothing out: it serves, and does not evaluate. Items that are new in the SID folder
are added to the recommender first. A killed job resumes at the first missing shard and writes the same files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pydantic import Field

from mmsid.artifacts import CHECKSUMS, on_main_process, read_table, write_table, writing
from mmsid.catalog import CatalogConfig, Item, read_catalog
from mmsid.catalog.columns import read_columns
from mmsid.catalog.logs.columns import sequence_fields
from mmsid.catalog.sources.locate import named_files
from mmsid.catalog.tables import Cells, read_table_rows, require_column
from mmsid.config import StageConfig
from mmsid.errors import ArtifactError, CatalogError, ConfigError
from mmsid.id_columns import holds_integers, with_id_column
from mmsid.progress import done, track
from mmsid.ray_pool import Engine, RayConfig, map_on_actors, ray_cluster
from mmsid.recommend.recommender import Recommender
from mmsid.recommend.recommender_files import embeddings_file
from mmsid.recommend.users import PROBLEMS, Users, users_of_catalog, users_of_file
from mmsid.sids.table import FILE_NAME, SidTable

SHARDS, PROBLEMS_FILE = "recommendations", "problems.parquet"
PART_USERS = 256  # users that are recommended to in one call; on Ray: `ray.rows_per_task`
SCHEMA = pa.schema(
    {
        "user_id": pa.string(),  # ids are int64 where they are whole numbers in the user's tables
        "item_ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "sources": pa.list_(pa.string()),
        "status": pa.string(),
        "unknown_ids": pa.int32(),
    }
)


class RecommendConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        catalog: the items and the users with their histories.
        recommender: folder of the recommender.
        sids: SID folder in use now, of the same tokenizer. It may have more items than the recommender: those of the catalogue are
            added. Items that it lacks are not recommended.
        users: table with the columns of `catalog.sequences`, or common names of them, one row per request: a user id may occur several
            times. Default: all users of the catalogue (`catalog.max_users` does not apply). Those whose log holds no known item come
            last, with an empty history.
        k: items per user; fewer where fewer qualify.
        only: table with a column `item_id`: the items that may be recommended. Default: all.
        exclude_seen: do not recommend items of the user's own history.
        shard_rows: users per output file, and the work that a killed job repeats at most.
        ray: options of `--engine ray`; not part of the manifest.
    """

    catalog: CatalogConfig
    recommender: Path
    sids: Path
    users: Path | None = None
    k: int = Field(100, ge=1)
    only: Path | None = None
    exclude_seen: bool = True
    shard_rows: int = Field(5000, ge=1)
    ray: RayConfig = Field(default=RayConfig(), exclude=True)

    def inputs(self) -> dict[str, Path | None]:
        """The recommender, the Semantic IDs with their embeddings, the catalogue, and the tables of users and of items."""
        sids = self.sids if self.sids.suffix == ".parquet" else self.sids / FILE_NAME
        found = {"recommender": self.recommender / CHECKSUMS, "sids": sids, "embeddings": embeddings_file(self.sids)}
        catalog = self.catalog.without_users() if self.users else self.catalog
        return found | catalog.inputs() | named_files("users", self.users) | {"only": self.only}


@on_main_process
def run(config: RecommendConfig, engine: Engine = "local") -> Path:
    """Write `recommendations/part-NNNNN.parquet` and `problems.parquet` to `config.out`.

    One row per user: `user_id`, the lists `item_ids`, `scores` and `sources` (best first; names of sources joined by `|`), `status`
    and `unknown_ids`, as in `mmsid.Recommendations`. Rows of unusable users are listed in problems.parquet and do not stop the job.

    Raises:
        ArtifactError: the recommender or the SID folder is unusable, or they do not belong together.
        CatalogError: the catalogue, the users or `only` cannot be read, or no id of `only` is known.
        ConfigError: there are no users, or Ray cannot be used.
    """
    if config.users is None and config.catalog.users_file is None:
        raise ConfigError("recommend: the catalogue has no users; name a table of users: --users FILE (recommend.users)")
    table = SidTable.load(config.sids)
    recommender = Recommender.from_pretrained(config.recommender, sids=table)
    catalog = read_catalog(config.catalog.without_users() if config.users else config.catalog.model_copy(update={"max_users": None}))
    with_sids, known = set(table.item_ids), set(recommender.item_ids)
    new = [item for item in catalog.items if item.item_id in with_sids and item.item_id not in known]
    only = None if config.only is None else _read_only(config.only, known.union(item.item_id for item in new))
    if config.users is None:
        integer_users = catalog.integer_user_ids
        total, shards = users_of_catalog(catalog, config.shard_rows)
    else:
        fields = sequence_fields(config.users, config.catalog, "recommend.users")
        integer_users = _has_integers(config.users, fields.user_id)
        total, shards = users_of_file(config.users, fields, config.shard_rows, known, config_key="recommend.users")
    settings = (config.k, config.exclude_seen, table.integer_ids, integer_users)
    service = _Service(config.recommender.absolute(), config.sids.absolute(), new, only, *settings)
    with writing(config.out, stage="recommend", config=config, inputs=config.inputs(), resume=True) as draft:
        files = _Shards(draft.path / SHARDS, shards, total)
        if engine == "ray":
            ray_config = config.ray.model_copy(update={"gpus_per_actor": config.ray.gpus_per_actor or 0.0})  # it runs on the CPU
            with ray_cluster(ray_config) as ray:
                files.write(lambda parts: map_on_actors(ray, service.load, parts, ray_config), ray_config.rows_per_task)
        else:
            files.write(partial(map, service.worker(recommender)), PART_USERS)
        write_table(draft.path / PROBLEMS_FILE, pa.Table.from_pylist(files.problems, schema=PROBLEMS))
        draft.counts |= {"in": total, "ok": files.users, "quarantined": len(files.problems), **files.counts}
        draft.counts |= {"added_items": len(new), "items_without_sids": sum(item.item_id not in with_sids for item in catalog.items)}
    _report(config, draft.counts)
    return config.out


class _Part(NamedTuple):
    """Users of one shard that are recommended to in one call."""

    shard: int
    place: int
    user_ids: list[str]
    histories: list[tuple[str, ...]]


class _Result(NamedTuple):
    """Recommendations of a part, with the columns of `SCHEMA`."""

    shard: int
    place: int
    table: pa.Table


Worker = Callable[[_Part], _Result]


@dataclass(frozen=True)
class _Service:
    """Everything that a process needs to recommend: folders of recommender and Semantic IDs, new items, and settings."""

    recommender: Path
    sids: Path
    new: list[Item]
    only: list[str] | None
    k: int
    exclude_seen: bool
    integer_ids: bool
    integer_user_ids: bool

    def load(self) -> Worker:
        """The worker of a Ray actor, which loads the recommender."""
        return self.worker(Recommender.from_pretrained(self.recommender))

    def worker(self, recommender: Recommender) -> Worker:
        """Function that recommends to a part, with the new items added to `recommender`."""
        recommender.grow(self.new, self.sids)

        def recommend(part: _Part) -> _Result:
            found = recommender.recommend(part.histories, self.k, exclude_seen=self.exclude_seen, only=self.only)
            sources = [["|".join(names) for names in user] for user in found.sources]
            columns = [part.user_ids, found.item_ids, found.scores, sources, found.status, found.unknown_ids]
            table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
            if self.integer_ids:
                table = table.set_column(1, "item_ids", table["item_ids"].cast(pa.list_(pa.int64())))
            return _Result(part.shard, part.place, with_id_column(table, self.integer_user_ids, "user_id"))

        return recommend


class _Shards:
    """The output files, one per shard of users.

    Attributes:
        users: number of rows in the finished files.
        counts: users of each status, and unknown ids in their histories.
        problems: rows of users that cannot be used.
    """

    def __init__(self, folder: Path, shards: Iterator[Users], total: int) -> None:
        self._folder, self._shards, self._total = folder, shards, total
        self.users, self.problems = 0, []
        self.counts = Counter(personal=0, unknown_history=0, empty_history=0, unknown_ids=0)

    def write(self, recommend: Callable[[Iterator[_Part]], Iterable[_Result]], part_users: int) -> None:
        """Write the shards that an earlier run did not finish. `recommend` may give the results in any order."""
        self._folder.mkdir(exist_ok=True)
        finished = {path.name for path in sorted(self._folder.glob("part-*.parquet")) if self._count_finished(path)}
        waiting: dict[int, list[pa.Table | None]] = {}
        note: dict[str, object] = {}

        def parts() -> Iterator[_Part]:
            for number, users in enumerate(self._shards):
                self.problems += users.problems
                if self.problems:
                    note["unusable"] = f"{len(self.problems):,}"
                if self._path(number).name in finished:
                    continue
                starts = range(0, max(len(users.ids), 1), part_users)  # a shard without a usable user is written, too
                waiting[number] = [None] * len(starts)
                for place, start in enumerate(starts):
                    end = start + part_users
                    yield _Part(number, place, users.ids[start:end], users.histories[start:end])

        results = track(
            recommend(parts()),
            what="recommend",
            total=self._total - self.users,
            unit="users",
            note=note,
            size=lambda result: len(result.table),
        )
        for result in results:
            tables = waiting[result.shard]
            tables[result.place] = result.table
            if all(table is not None for table in tables):
                whole = pa.concat_tables(waiting.pop(result.shard))
                write_table(self._path(result.shard), whole)
                self._count(whole)

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.parquet"

    def _count_finished(self, path: Path) -> bool:
        """Count the rows of a file of an earlier run. False if it is damaged; it is written again."""
        try:
            self._count(read_table(path))
        except ArtifactError:
            return False
        return True

    def _count(self, table: pa.Table) -> None:
        self.users += len(table)
        self.counts.update(table["status"].to_pylist())
        self.counts["unknown_ids"] += sum(table["unknown_ids"].to_pylist())


def _has_integers(users: Path, column: str) -> bool:
    return holds_integers(read_columns(users, [column], config_key="recommend.users").table[column].type)


def _read_only(path: Path, known: set[str]) -> list[str]:
    """Ids of the column `item_id` that are known.

    Raises:
        CatalogError: the file cannot be read, an id is missing, or no id is known.
    """
    table = read_table_rows(path, ["item_id"], config_key="recommend.only")
    require_column(table, "item_id", "recommend.only")
    cells = Cells(table, "|")
    ids = [cells.text(index, "item_id") for index in range(len(table.rows))]
    found = sorted(known.intersection(ids))
    if not found:
        raise CatalogError(
            f"{path}, field 'item_id': the recommender knows none of the {len(ids):,} ids (first: {ids[0]!r}, it knows "
            f"{min(known)!r}); name a file of this catalogue, or write the ids in the same way"
        )
    return found


def _report(config: RecommendConfig, counts: dict[str, int]) -> None:
    notes = [f"{counts['added_items']:,} new items were added to the recommender"] if counts["added_items"] else []
    if counts["items_without_sids"]:
        notes.append(f"{counts['items_without_sids']:,} items of the catalogue have no Semantic ID and are not recommended")
    if counts["quarantined"]:
        notes.append(f"{counts['quarantined']:,} rows are unusable, see {config.out / PROBLEMS_FILE}")
    done(
        f"recommend: wrote recommendations for {counts['ok']:,} users ({counts['personal']:,} personal; popular and new items for "
        f"{counts['unknown_history']:,} unknown and {counts['empty_history']:,} empty histories) to {config.out / SHARDS}"
        + "".join(f"; {note}" for note in notes)
    )
