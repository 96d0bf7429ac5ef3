"""A span for each request, sent to an OpenTelemetry collector: the optional extra `tracing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraplex.engine.outputs import RequestMetrics

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


def otlp_provider(endpoint: str) -> TracerProvider:
    """Sends to a collector that speaks OTLP over HTTP, such as http://localhost:4318/v1/traces.

    Raises ValueError where the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(
            f"otlp_endpoint={endpoint!r} is not allowed: it needs pip install 'loraplex[tracing]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "loraplex"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracer:
    """Starts and ends the spans. The caller's trace goes on, if it sent a traceparent."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("loraplex")
        self._propagator = TraceContextTextMapPropagator()

    def start(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Span:
        from opentelemetry.trace import SpanKind

        carrier = {
            name.decode(): headers[name].decode("latin-1")
            for name in (b"traceparent", b"tracestate")
            if name in headers
        }
        context = self._propagator.extract(carrier)
        return self._tracer.start_span(f"{method} {path}", context, SpanKind.SERVER)

    def end(self, span: Span, entry: Mapping[str, Any], times: RequestMetrics | None) -> None:
        """entry: of the access log. times: of a generation, the first of several."""
        from opentelemetry.trace import StatusCode

        attributes = {
            "http.request.method": entry["method"],
            "url.path": entry["path"],
            "http.response.status_code": entry["status"],
            "loraplex.request_id": entry["request_id"],
            "loraplex.complete": entry["complete"],
            "loraplex.adapters": entry["adapters"],
            "gen_ai.usage.input_tokens": entry["prompt_tokens"],
            "gen_ai.usage.output_tokens": entry["output_tokens"],
        }
        if entry["key"] is not None:
            attributes["loraplex.key"] = entry["key"]
        if times is not None and times.first_scheduled_time:
            queue = times.first_scheduled_time - times.arrival_time
            attributes["gen_ai.latency.time_in_queue"] = queue
            if times.first_token_time:
                first = times.first_token_time - times.arrival_time
                attributes["gen_ai.latency.time_to_first_token"] = first
        span.set_attributes(attributes)
        if entry["status"] >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()
