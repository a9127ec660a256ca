"""Traces by OpenTelemetry: a span for each side effect, and its context for HTTP runners.

This is an extra, `pip install 'sequencerd[otel]'`, configured by OpenTelemetry's own variables: it
is on if OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sequencerd.core.enrollment import Enrollment
from sequencerd.core.task import Failed, Result, outcome

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_tracer: Tracer | None = None

EndSpans = Callable[[Sequence[Result]], None]


def start(environment: Mapping[str, str]) -> Callable[[], None]:
    """Start tracing if the environment asks for it. Return a function that ends it and sends the
    remaining spans.

    Raises ModuleNotFoundError if the extra is not installed.
    """
    if not any(environment.get(name) for name in _ENDPOINTS):
        return lambda: None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - an extra
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    named = "OTEL_SERVICE_NAME" in environment
    provider = TracerProvider(
        resource=Resource.create({} if named else {"service.name": "sequencerd"})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    use(provider)
    return provider.shutdown


def use(provider: TracerProvider | None) -> None:
    """Send spans to a provider from now on; None sends them nowhere."""
    global _tracer  # noqa: PLW0603 - as OpenTelemetry's own: one for the process
    _tracer = None if provider is None else provider.get_tracer("sequencerd")


@contextmanager
def executing(type_: str, enrollments: Sequence[Enrollment]) -> Iterator[EndSpans]:
    """Open spans around one call of a runner; assign the results to the yielded value.

    Each side effect has a span. The spans of a batch are inside another span, which represents the
    call.
    """
    spans: list[Span] = []

    def ended(results: Sequence[Result]) -> None:
        for span, result in zip(spans, results, strict=False):
            _record_error(span, result)

    name = f"execute {type_}"
    if _tracer is None or not enrollments:
        yield ended
        return
    if len(enrollments) == 1:
        with _tracer.start_as_current_span(name, attributes=_attributes(enrollments[0])) as span:
            spans.append(span)
            yield ended
        return
    with _tracer.start_as_current_span(
        f"{name} batch", attributes={"sequencerd.batch_size": len(enrollments)}
    ):
        spans += [_tracer.start_span(name, attributes=_attributes(one)) for one in enrollments]
        try:
            yield ended
        finally:
            for span in spans:
                span.end()


def headers() -> dict[str, str]:
    """Return the headers that identify the span of a call (W3C Trace Context)."""
    if _tracer is None:
        return {}
    from opentelemetry.propagate import inject  # noqa: PLC0415 - an extra

    found: dict[str, str] = {}
    inject(found)
    return found


def _attributes(enrollment: Enrollment) -> dict[str, str | int]:
    return {
        "sequencerd.enrollment": enrollment.id,
        "sequencerd.sequence": enrollment.sequence,
        "sequencerd.step": enrollment.step,
        "sequencerd.visit": enrollment.visit,
        "sequencerd.attempt": enrollment.attempt,
    }


def _record_error(span: Span, result: Result) -> None:
    """Record an error without its message, which may contain a recipient."""
    from opentelemetry.trace import StatusCode  # noqa: PLC0415 - an extra

    span.set_attribute("sequencerd.outcome", outcome(result))
    if isinstance(result, Failed):
        span.set_status(StatusCode.ERROR)
