"""A pytest plugin: resources that a failing test leaves open fail no other test. The traceback
keeps them alive, so they would be collected during a later test, which would then fail with the
warning of an unclosed resource.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    failed = item.session.testsfailed
    done = yield
    if item.session.testsfailed > failed:
        for name in ("last_exc", "last_value", "last_traceback"):
            vars(sys).pop(name, None)
        report, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                gc.collect()
        finally:
            sys.unraisablehook = report
    return done
