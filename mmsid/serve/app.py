"""The service as an ASGI application: `create_app(bundle, settings)`. `mmsid serve` runs it; tests and other servers may, too."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from mmsid._version import __version__
from mmsid.errors import MmsidError
from mmsid.serve import schemas
from mmsid.serve.ads import Ad
from mmsid.serve.engine import AppendResult, EncodedAd, Engine
from mmsid.serve.guard import Guard
from mmsid.serve.interface_page import interface_page, request_body
from mmsid.serve.page import page, policy
from mmsid.serve.requests import BadRequest, parse_json
from mmsid.serve.service import Service, Unusable
from mmsid.serve.settings import ServeSettings
from mmsid.serve.views import encoded_view, item_view, recommended_view
from mmsid.serve.worker import Expired, Overloaded


def create_app(bundle: str | Path, settings: ServeSettings | None = None) -> FastAPI:
    """The ASGI application that serves a bundle. The bundle is loaded when the application starts.

    Args:
        bundle: folder of `mmsid bundle`.
        settings: limits, key, and the file of appended items.

    Raises (at its start):
        ArtifactError: the bundle or the file of appended items cannot be used.
    """
    service = Service(Path(bundle), settings or ServeSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="mmsid",
        version=__version__,
        description="Semantic IDs of new ads, recommendations, and appending. One bundle is served.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_routes(app, service)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    made, generate = {}, app.openapi

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(generate())
            made.setdefault("components", {}).setdefault("schemas", {}).update(schemas.components())
        return made

    app.openapi = openapi  # type: ignore[method-assign]
    app.state.service = service
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.Problem, "description": text}
        for status, text in {
            401: "The key is missing or wrong.",
            413: "The body is too long.",
            422: "The request cannot be used.",
            429: "Overloaded; `Retry-After` says when to try again.",
            504: "The time limit has passed.",
        }.items()
    }

    @app.post("/encode", tags=["ads"], responses=problems | {200: {"model": schemas.EncodeAnswer}}, openapi_extra=request_body("encode"))
    async def encode(request: Request) -> Response:
        """Caption, interests, Semantic ID with its path in the tree, and nearest ads, of one ad or many. Nothing is stored."""
        asked, records = await service.read(request, schemas.EncodeRequest, "ads")
        ads = await service.decode(records, [f"ads[{at}]" for at in range(len(records))])
        usable = [ad for ad in ads if isinstance(ad, Ad)]
        encoded = iter(await service.work(kind="encode", ads=usable) if usable else [])
        found: list[EncodedAd | Unusable] = [next(encoded) if isinstance(ad, Ad) else ad for ad in ads]
        results = await asyncio.to_thread(_encode_results, service.engine, found, records, asked.k, asked.pictures)
        return _answer(service, results, "ok")

    @app.post(
        "/recommend", tags=["ads"], responses=problems | {200: {"model": schemas.RecommendAnswer}}, openapi_extra=request_body("recommend")
    )
    async def recommend(request: Request) -> Response:
        """Recommend items for histories of item ids and of new ads, with the sources that proposed each item."""
        asked = await asyncio.to_thread(parse_json, await request.body(), schemas.RecommendRequest)
        service.check_count(len(asked.histories), "histories")
        given = [(user, at) for user, history in enumerate(asked.histories) for at, one in enumerate(history) if not isinstance(one, str)]
        service.check_count(len(given), "new ads")
        histories: list[list[Any]] = [list(history) for history in asked.histories]
        records = [histories[user][at].model_dump(exclude_none=True) for user, at in given]
        ads = await service.decode(records, [f"histories[{user}][{at}]" for user, at in given])
        for (user, at), ad in zip(given, ads, strict=True):
            if not isinstance(ad, Ad):
                raise BadRequest(str(ad))
            histories[user][at] = ad
        options = {"k": asked.k, "exclude_seen": asked.exclude_seen, "only": asked.only}
        found = await service.work(kind="recommend", histories=histories, options=options)
        view = partial(recommended_view, service.engine, pictures=asked.pictures)
        return JSONResponse({"results": await asyncio.to_thread(lambda: [view(one) for one in found])})

    @app.post("/items", tags=["items"], responses=problems | {200: {"model": schemas.AppendAnswer}}, openapi_extra=request_body("items"))
    async def append(request: Request) -> Response:
        """Append new ads. What this answers 200 for is on the disk, can be recommended at once, and may be sent again without effect."""
        _, records = await service.read(request, schemas.AppendRequest, "items")
        ads = await service.decode(records, [f"items[{at}]" for at in range(len(records))])
        usable = [ad for ad in ads if isinstance(ad, Ad)]
        appended = iter(await service.work(kind="append", ads=usable) if usable else [])
        service.metrics.items.set(len(service.engine.known))
        results = [
            _append_result(service.engine, next(appended) if isinstance(ad, Ad) else ad, record)
            for ad, record in zip(ads, records, strict=True)
        ]
        return _answer(service, results, "added", "known")

    @app.get("/items/{item_id:path}", tags=["items"], responses={200: {"model": schemas.Item}, 404: {"model": schemas.Problem}})
    async def item(item_id: str, pictures: bool = False) -> Response:
        """One known item."""
        found = item_view(service.engine, item_id, pictures=pictures)
        if found is None:
            raise HTTPException(404, f"no item {item_id[:100]!r}")
        return JSONResponse(found)

    @app.get("/about", tags=["service"], responses={200: {"model": schemas.About}})
    async def about() -> Response:
        """What is served: version, sizes, what it cannot do, and a few items."""
        engine = service.engine
        rows = list(range(0, len(engine.bundle.table), max(1, len(engine.bundle.table) // 12)))[:12]
        return JSONResponse(
            {
                "version": engine.version,
                "items": len(engine.known),
                "appended": len(engine.known) - len(engine.bundle.table),
                "num_levels": engine.tokenizer.num_levels,
                "codebook_size": engine.tokenizer.codebook_size,
                "recommends": engine.recommender is not None,
                "appends": engine.store is not None,
                "notes": engine.notes,
                "examples": [engine.known.card(row, picture=False) for row in rows],
            }
        )

    @app.get("/healthz", tags=["service"])
    async def healthz() -> Response:
        """200 while requests are answered, 503 while the service stops."""
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics", tags=["service"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(page(), headers={"content-security-policy": policy(page())})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        text = interface_page(app.openapi())
        return HTMLResponse(text, headers={"content-security-policy": policy(text)})

    _add_error_handlers(app)


def _add_error_handlers(app: FastAPI) -> None:
    def problem(status: int, code: str, headers: dict[str, str] | None = None) -> Callable[[Request, Exception], Any]:
        async def handle(request: Request, error: Exception) -> Response:
            return JSONResponse({"error": code, "detail": str(error) or code}, status, headers)

        return handle

    async def http_problem(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": "http", "detail": error.detail}, error.status_code, error.headers)

    app.add_exception_handler(BadRequest, problem(422, "request"))
    app.add_exception_handler(MmsidError, problem(503, "service"))
    app.add_exception_handler(Overloaded, problem(429, "overloaded", {"retry-after": "1"}))
    app.add_exception_handler(Expired, problem(504, "timeout"))
    app.add_exception_handler(HTTPException, http_problem)  # type: ignore[arg-type]


def _answer(service: Service, results: list[dict[str, Any]], *good: str) -> Response:
    """200 if one of the results is good; 409 if all are conflicts, else 422."""
    counts = Counter(one["status"] for one in results)
    for status, count in counts.items():
        service.metrics.ads.labels(status).inc(count)
    bad = 409 if set(counts) == {"conflict"} else 422
    status = 200 if any(counts[name] for name in good) else bad
    return JSONResponse({"results": results, "counts": {"in": len(results), **counts}}, status)


def _encode_results(
    engine: Engine, found: Sequence[EncodedAd | Unusable], records: Sequence[Mapping[str, Any]], k: int, pictures: bool
) -> list[dict[str, Any]]:
    return [
        {"status": "ok", **encoded_view(engine, one, k, pictures=pictures)}
        if isinstance(one, EncodedAd)
        else {"status": "quarantined", "item_id": record.get("item_id"), "reason": str(one)}
        for one, record in zip(found, records, strict=True)
    ]


def _append_result(engine: Engine, one: AppendResult | Unusable, record: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(one, AppendResult):
        return {"status": "quarantined", "item_id": record.get("item_id"), "sid": None, "reason": str(one)}
    sid = engine.known.sid(one.row) if one.row is not None and one.status in ("added", "known") else None
    return {"status": one.status, "item_id": one.item_id, "sid": sid, "reason": one.detail or None}
