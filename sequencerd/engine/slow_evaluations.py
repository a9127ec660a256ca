"""Keep conditions and templates that compute for long from holding up everything else.

An evaluation may compute for a quarter of a second, and nothing else runs in the event loop
meanwhile. So a batch ends early if its evaluations are slow: the rest is evaluated later.
"""

from __future__ import annotations

from time import perf_counter

from sequencerd.core.javascript.sandbox import SLOW_SECONDS

MAX_SLOW = 0.25  # seconds of slow evaluations in one batch


class SlowEvaluations:
    """Measures the slow evaluations of a batch, from its beginning."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.resume()

    def resume(self) -> None:
        """Continue to measure, after something else has run in the loop."""
        self._last = perf_counter()

    def end_batch(self) -> bool:
        """Return whether the batch should end, after each evaluation."""
        now = perf_counter()
        took, self._last = now - self._last, now
        if took > SLOW_SECONDS:
            self.seconds += took
        return self.seconds > MAX_SLOW
