"""What Prometheus reads: requests by the HTTP layer, images and steps by the worker."""

import time
from collections.abc import Iterator, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maskgit.apps.serving.middleware import App, Message, Receive, Send
from maskgit.apps.serving.service import Service

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The metrics of one application."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Worked(service))
        self.requests = Counter(
            "maskgit_requests", "Requests answered.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "maskgit_request_seconds",
            "Time from a request's head to the end of its answer.",
            ["path"],
            buckets=_BUCKETS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Worked(Collector):
    """Tells the worker's numbers when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats
        for name, about, value in (
            ("images", "Images finished.", stats.images),
            ("steps", "Decoding steps of the batch.", stats.steps),
            ("failures", "Images that failed.", stats.failures),
            ("halvings", "Times that memory ran out.", stats.halvings),
        ):
            yield CounterMetricFamily(f"maskgit_{name}", about, value)
        for name, about, number in (
            ("accepted_images", "Images accepted and not answered yet.", self._service.num_accepted),
            ("batch_rows", "Images being decoded.", stats.rows),
            ("waiting_images", "Images that have not begun.", stats.waiting),
            ("seconds_per_step", "Recent time for a decoding step of one image.", stats.seconds_per_step),
            ("ready", "1 if requests are accepted.", float(self._service.ready)),
        ):
            yield GaugeMetricFamily(f"maskgit_{name}", about, number)


class Counted:
    """Counts an application's answers and their time; a plain ASGI wrapper."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        # What was never answered: the client left.
        status = 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            # Paths that are no route of ours are not told apart, or anyone could fill the memory with them.
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
