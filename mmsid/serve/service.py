"""What the routes of one application share: engine, worker, decoders and metrics, and reading of requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from mmsid.errors import CatalogError, PictureError
from mmsid.serve.ads import Ad, read_ad
from mmsid.serve.engine import Engine
from mmsid.serve.metrics import Metrics
from mmsid.serve.requests import BadRequest, RequestT, checked, parse_form, parse_json
from mmsid.serve.settings import ServeSettings
from mmsid.serve.worker import Job, Worker

Unusable = CatalogError | PictureError


class Service:
    """Engine, worker, decoders and metrics of one application."""

    def __init__(self, bundle: Path, settings: ServeSettings) -> None:
        self.settings, self.metrics = settings, Metrics()
        make_engine = partial(Engine, bundle, settings.state, captions=settings.captions)
        self.worker = Worker(make_engine, settings.queue, settings.batch, self.metrics.batch.observe)
        self.decoders = ThreadPoolExecutor(settings.decoders, "decode")
        self.engine: Engine = None  # type: ignore[assignment]

    def start(self) -> None:
        """Load the bundle; a second call does nothing. Raises ArtifactError."""
        if self.engine is None:
            self.engine = self.worker.start()
            self.metrics.items.set(len(self.engine.known))

    def stop(self) -> None:
        """Finish what is queued and close the file of appended items."""
        self.worker.stop()
        self.decoders.shutdown(cancel_futures=True)

    async def read(self, request: Request, model: type[RequestT], many: str) -> tuple[RequestT, list[dict[str, Any]]]:
        """A request of one or many ads, as JSON or a form, and the record of each ad."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            limits = self.settings.pictures
            async with request.form(max_files=self.settings.ads, max_fields=1_000, max_part_size=limits.max_bytes) as form:
                values, pictures = await parse_form(form, many)
            found = checked(values, model)
            records = [ad.model_dump(exclude_none=True) | {"images": own} for ad, own in zip(getattr(found, many), pictures, strict=True)]
        elif kind == "application/json":
            found = await asyncio.to_thread(parse_json, await request.body(), model, many)
            records = [ad.model_dump(exclude_none=True) for ad in getattr(found, many)]
        else:
            raise HTTPException(415, f"content type {kind[:100]!r}; send application/json or multipart/form-data")
        self.check_count(len(records), many)
        return found, records

    def check_count(self, count: int, what: str) -> None:
        if count > self.settings.ads:
            raise BadRequest(f"{count} {what}, at most {self.settings.ads} per request; send them in several")

    async def decode(self, records: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[Ad | Unusable]:
        """Ads of the records, or the error of each that cannot be used. Pictures are decoded in child processes, a few at a time."""
        loop = asyncio.get_running_loop()

        def read(record: Mapping[str, Any], place: str) -> Ad | Unusable:
            try:
                return read_ad(record, self.settings.pictures, place, clean_text=self.engine.clean_text)
            except (CatalogError, PictureError) as error:
                return error

        found = await asyncio.gather(*(loop.run_in_executor(self.decoders, read, *pair) for pair in zip(records, places, strict=True)))
        for one in found:
            if isinstance(one, PictureError):
                self.metrics.pictures.labels(one.reason).inc()
        return found

    async def work(self, **job: Any) -> list[Any]:
        """Queue a job and wait for its result."""
        result = self.worker.submit(Job(deadline=time.monotonic() + self.settings.seconds, **job))
        return await asyncio.wrap_future(result)
