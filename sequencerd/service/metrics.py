"""Count and measure the daemon's work, for Prometheus.

Called once for a batch, never for an enrollment. The number of labels is limited: sequences and
steps beyond MAX_PLACES are counted together as "other".
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import groupby

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sequencerd import __version__
from sequencerd.core.decision import Event
from sequencerd.core.task import Result, outcome

MAX_PLACES = 1000
OTHER_LABELS = ("other", "other")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LATENESS_BUCKETS = (*_SECONDS, 60.0, 600.0, 3600.0)
DURATION_BUCKETS = (0.001, 0.0025, *_SECONDS, 30.0, 60.0)
SIZE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)

_MOVES = frozenset({"enrolled", "next", "altNext", "goal", "jump", "branch", "completed"})

DueAtStep = tuple[str, str, int, int]
"""Sequence, step, the number of due enrollments, and the number overdue by more than a minute."""


def _register_process(registry: CollectorRegistry) -> None:
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)


class ShardMetrics(Collector):
    """The metrics of all shards, each with the label `shard`, and those of the process."""

    def __init__(self, shards: Callable[[], Mapping[str, CollectorRegistry]]) -> None:
        self.registry = CollectorRegistry()
        self._shards = shards
        self.registry.register(self)
        _register_process(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield each family once, with the samples of all shards."""
        families: dict[str, Metric] = {}
        for shard, registry in self._shards().items():
            for found in registry.collect():
                family = families.setdefault(
                    found.name, Metric(found.name, found.documentation, found.type)
                )
                family.samples += [
                    sample._replace(labels={"shard": shard, **sample.labels})
                    for sample in found.samples
                ]
        yield from families.values()


class Metrics(Collector):
    """The daemon's metrics, in a registry of their own.

    Written in the daemon's event loop, read in the thread of the HTTP listener.
    """

    def __init__(self, *, of_process: bool = True) -> None:
        """Make the metrics; `of_process` adds those of the process."""
        self.registry = CollectorRegistry()
        self.swept_at: float | None = None  # monotonic
        self.places = 0  # steps with active enrollments at the last sweep
        self._due: Sequence[DueAtStep] = ()
        self._oldest: datetime | None = None
        self._now: Callable[[], datetime] | None = None
        self._known: dict[tuple[str, str], tuple[str, str]] = {}
        self._late = [0] * (len(LATENESS_BUCKETS) + 1)
        self._late_sum = 0.0

        place = ("sequence", "step")
        self._claims = self._counter("claims", "Due enrollments that were claimed", *place)
        self._transitions = self._counter(
            "transitions", "Moves that were written", *place, "action"
        )
        self._retries = self._counter("retries", "Side effects and lookups to be retried", *place)
        self._lease_expired = self._counter(
            "lease_expired", "Side effects interrupted by a crash", *place
        )
        self._failures = self._counter("failures", "Enrollments that failed", *place, "failure")
        self._effects = self._counter("effects", "Side effects that ended", "type", "outcome")
        self._latency = Histogram(
            "sequencerd_effect_latency_seconds",
            "How long a runner took for a call, which may be for a batch",
            ["type"],
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self._down = self._gauge(
            "runner_down",
            "1 while a runner's server fails: outage, login, quota, throttling",
            "type",
        )
        self._outages = self._counter(
            "runner_outages", "How often a runner's server failed", "type"
        )
        self._waiting = self._gauge(
            "runner_waiting",
            "Due enrollments that wait for a failing runner; up to 10,000 for each step",
            "type",
        )
        self._in_flight = self._gauge(
            "in_flight",
            "Enrollments with side effects that this daemon has started or queued",
            "type",
        )
        self._batch_size = Histogram(
            "sequencerd_batch_size",
            "Enrollments in a transaction",
            buckets=SIZE_BUCKETS,
            registry=self.registry,
        )
        self._braked = self._gauge(
            "braked", "1 while a sequence is paused by its brake", "sequence"
        )
        self.quarantined = self._gauge(
            "quarantined",
            "Enrollments that the database refuses to read or write, set aside by this daemon",
        )
        self.reconnects = self._counter(
            "listener_reconnects", "How often the listening connection was replaced"
        )
        self.refused = self._counter(
            "notifications_refused", "Notifications on the daemon's channel that are not understood"
        )
        self.ready = self._gauge("ready", "1 while /readyz would answer 200")
        self.connection_wait = self._gauge(
            "connection_wait_seconds",
            "How long the oldest request for a database connection has been waiting",
            "pool",
        )
        self.clock_offset = self._gauge(
            "clock_offset_seconds", "How far the database's clock is ahead of this machine's"
        )
        info = self._gauge("info", "This daemon", "version")
        info.labels(__version__).set(1)
        self.registry.register(self)
        if of_process:
            _register_process(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"sequencerd_{name}", about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(f"sequencerd_{name}", about, labels, registry=self.registry)

    # --- what the engine reports

    def claimed(self, place: tuple[str, str], due: Sequence[datetime], now: datetime) -> None:
        """Count a claim: since when enrollments of one step were due, in this order."""
        if not due:
            return
        self._claims.labels(*self._place(place)).inc(len(due))
        on_time, late = len(due), self._late
        for n, bound in enumerate(LATENESS_BUCKETS):
            later = bisect_left(due, now - timedelta(seconds=bound), 0, on_time)
            late[n] += on_time - later
            on_time = later
        late[-1] += on_time
        self._late_sum += sum((now - at for at in due), timedelta()).total_seconds()

    def written(
        self,
        count: int,
        events: Mapping[Event, Sequence[int]],
        failures: Iterable[tuple[str, str, str]],
    ) -> None:
        """Count a committed transaction: the number of enrollments, their events, and failures by
        (sequence, step, code).
        """
        if count:
            self._batch_size.observe(count)
        happened = Tally[tuple[str, str, str]]()
        for event, ids in events.items():
            happened[event.sequence, event.step, event.action] += len(ids)
        for (sequence, step, action), times in happened.items():
            known = self._place((sequence, step))
            if action in _MOVES:
                self._transitions.labels(*known, action).inc(times)
            elif action == "retry":
                self._retries.labels(*known).inc(times)
            elif action == "lease_expired":
                self._lease_expired.labels(*known).inc(times)
        for (*place, code), times in Tally(failures).items():
            self._failures.labels(*self._place((place[0], place[1])), code).inc(times)

    def runner_is_down(self, name: str, *, is_down: bool) -> None:
        """Record that a runner's server has failed, or works again."""
        if is_down:
            self._outages.labels(name).inc()
        else:
            self._waiting.labels(name).set(0)
        self._down.labels(name).set(is_down)

    def runner_waits(self, name: str, count: int) -> None:
        """Record how many enrollments wait for a runner that is down."""
        self._waiting.labels(name).set(count)

    def braked(self, sequences: Iterable[str]) -> None:
        """Record which sequences are paused by their brakes."""
        self._braked.clear()
        for sequence in sequences:
            self._braked.labels(sequence).set(1)

    def begun(self, kind: str, count: int) -> None:
        """Count side effects of a step type, or "lookup"s, that have begun."""
        self._in_flight.labels(kind).inc(count)

    def ended(self, kind: str, results: Sequence[Result], seconds: float | None) -> None:
        """Count results, with the duration of the call in seconds; None if there was no call."""
        self._in_flight.labels(kind).dec(len(results))
        if seconds is not None:
            self._latency.labels(kind).observe(seconds)
        for result, same in groupby(results):  # most results in a batch are equal
            self._effects.labels(kind, outcome(result)).inc(sum(1 for _ in same))

    def swept(
        self,
        now: Callable[[], datetime],
        places: int,
        oldest: datetime | None,
        due: Iterable[DueAtStep],
    ) -> None:
        """Record the result of a sweep: the steps with active enrollments, and the earliest due
        one.
        """
        self._now, self._oldest, self.places = now, oldest, places
        named: list[DueAtStep] = []
        others = [0, 0]
        for sequence, step, count, overdue in due:
            if (known := self._place((sequence, step))) == OTHER_LABELS:
                others = [others[0] + count, others[1] + overdue]
            else:
                named.append((*known, count, overdue))
        self._due = [*named, (*OTHER_LABELS, others[0], others[1])] if any(others) else named
        self.swept_at = time.monotonic()

    @property
    def overdue(self) -> int:
        """Return how many enrollments were overdue by more than a minute at the last sweep."""
        return sum(overdue for _, _, _, overdue in self._due)

    def _place(self, place: tuple[str, str]) -> tuple[str, str]:
        """Return the labels of a step."""
        if place not in self._known and len(self._known) >= MAX_PLACES:
            return OTHER_LABELS
        return self._known.setdefault(place, place)

    # --- called by the registry

    def collect(self) -> Iterator[Metric]:
        """Yield the values that are not kept in metric objects."""
        place = ("sequence", "step")
        about = "Enrollments that are due, as of the last sweep; counted up to 10,000 for each step"
        due = GaugeMetricFamily("sequencerd_due", about, labels=place)
        about = "Of those, overdue by more than a minute"
        overdue = GaugeMetricFamily("sequencerd_overdue", about, labels=place)
        for sequence, step, count, late in self._due:
            due.add_metric((sequence, step), count)
            overdue.add_metric((sequence, step), late)
        yield due
        yield overdue
        about = "How long the earliest due enrollment has been due, as of the last sweep"
        age = 0.0
        if self._oldest is not None and self._now is not None:
            age = max((self._now() - self._oldest).total_seconds(), 0.0)
        yield GaugeMetricFamily("sequencerd_oldest_overdue_seconds", about, age)
        about = "Time from the wake time of enrollments to their claim"
        buckets, count = [], 0
        for bound, times in zip((*map(str, LATENESS_BUCKETS), "+Inf"), self._late, strict=True):
            count += times
            buckets.append((bound, float(count)))
        yield HistogramMetricFamily(
            "sequencerd_lateness_seconds", about, buckets=buckets, sum_value=self._late_sum
        )
