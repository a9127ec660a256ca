"""A limit that evaluations reach sooner."""

from __future__ import annotations

import pytest

from sequencerd.core.javascript import sandbox


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop evaluations after less CPU time, for tests of many that would need more than any."""
    monkeypatch.setattr(sandbox, "EVALUATION_SECONDS", 0.1)
