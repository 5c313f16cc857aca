"""Pictures of a catalogue looked at on a Ray cluster, before the rows are read (extra `ray`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.fields import FieldMapping, item_fields
from mmsid.catalog.item_table import texts
from mmsid.catalog.picture_sources.inspection import inspect_pictures
from mmsid.catalog.pictures import InspectedPicture
from mmsid.catalog.sources import OpenedTable
from mmsid.progress import track
from mmsid.ray_pool import RayConfig, map_on_actors, ray_cluster

Inspected = dict[str, InspectedPicture]


def inspected_on_ray(config: CatalogConfig, table: OpenedTable, mapping: FieldMapping, ray_config: RayConfig) -> Inspected:
    """Reference -> result for every picture that is named by a text. The image root and the picture cache are on a shared file system.

    Raises:
        ConfigError: Ray is not installed, or the cluster lacks the slots that the actors need.
        CatalogError: the table cannot be read.
    """
    references = list(dict.fromkeys(_references(config, table, mapping)))
    size = ray_config.rows_per_task
    pieces = [references[start : start + size] for start in range(0, len(references), size)]
    worker = partial(_worker, config.model_copy(update={"image_root": config.root.absolute()}), config.picture_cache.absolute())
    on_cpus = ray_config.model_copy(update={"gpus_per_actor": ray_config.gpus_per_actor or 0.0})
    found: Inspected = {}
    with ray_cluster(ray_config) as ray:
        results = map_on_actors(ray, worker, pieces, on_cpus)
        for result in track(results, "ingest: pictures", total=len(references), unit="pictures", size=len):
            found |= result
    return found


def _references(config: CatalogConfig, table: OpenedTable, mapping: FieldMapping) -> Iterator[str]:
    images = FieldMapping(mapping.item_id, image=mapping.image, list_separator=mapping.list_separator)
    for batch in table.batches(images.columns):
        pictures = item_fields(batch, images, config.clean_text)["pictures"].combine_chunks().flatten()
        if len(pictures):
            yield from filter(None, texts(pictures.field("ref")))


def _worker(config: CatalogConfig, cache: Path) -> Callable[[Sequence[str]], Inspected]:
    def inspect(references: Sequence[str]) -> Inspected:
        return dict(zip(references, inspect_pictures(references, config.pictures, config.root, cache), strict=True))

    return inspect
