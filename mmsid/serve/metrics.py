"""Prometheus metrics of one service."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Metrics in a registry of their own, so that several services may live in one process.

    Attributes:
        content_type: of `text`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, processor time, open files
        self._requests = Counter("mmsid_requests", "Requests by route and status", ["route", "status"], registry=registry)
        self._seconds = Histogram("mmsid_request_seconds", "Seconds per request", ["route"], buckets=_SECONDS, registry=registry)
        self.in_flight = Gauge("mmsid_requests_in_flight", "Requests that wait or are worked on", registry=registry)
        self.rejected = Counter("mmsid_requests_rejected", "Requests answered 429", registry=registry)
        self.batch = Histogram("mmsid_batch_requests", "Requests worked on together", buckets=(1, 2, 4, 8, 16, 32), registry=registry)
        self.ads = Counter("mmsid_ads", "Ads by what became of them", ["result"], registry=registry)
        self.pictures = Counter("mmsid_pictures_refused", "Refused pictures by reason", ["reason"], registry=registry)
        self.items = Gauge("mmsid_items", "Known items", registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one request; status 0: the client went away before an answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
