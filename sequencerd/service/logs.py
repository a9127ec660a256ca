"""Log with structlog, on standard error: as JSON for programs, as columns for a terminal.

From the level "info" on, a line names enrollments, sequences and steps, but nothing personal: data,
addresses and servers' answers are in the history, and at the level "debug". No line contains a
secret from the settings.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, ExcInfo, FilteringBoundLogger, Processor, WrappedLogger

from sequencerd.core.describe import visible
from sequencerd.service.redaction import make_redaction
from sequencerd.service.systemd import is_journal
from sequencerd.settings import Settings
from sequencerd.storage.database_errors import TRANSIENT_ERRORS

REPEATS_WITHIN = 5.0  # seconds in which equal warnings are about one cause
REPEATED_EVERY = 60.0  # seconds after which such a warning is written again
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def make_log(settings: Settings) -> FilteringBoundLogger:
    """Return the logger for all parts of the program. A later call reconfigures all loggers made
    before.
    """
    is_terminal = sys.stderr.isatty()
    is_text = settings.log.format == "text" or (settings.log.format == "auto" and is_terminal)
    render: Processor = structlog.processors.JSONRenderer(default=str)
    if is_text:
        # not rich's tracebacks, which show the values of variables
        render = structlog.dev.ConsoleRenderer(
            colors=is_terminal, exception_formatter=_write_traceback
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _limit_repetitions(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _make_visible if is_text else structlog.processors.format_exc_info,
            _finish(render, make_redaction(settings)),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log.level.upper()]
        ),
        logger_factory=lambda *_: structlog.WriteLogger(_STDERR),
    )
    log: FilteringBoundLogger = structlog.get_logger()
    # warnings that libraries log are written in the same form
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING)
    return log


@dataclass(slots=True)
class _Repetition:
    written_at: float
    seen_at: float
    dropped: int = 0


def _limit_repetitions() -> Processor:
    """Return a processor that drops what each attempt would log again: while a warning about an
    error repeats, it is written once a minute, with how often it was not.
    """
    repeating: dict[str, _Repetition] = {}

    def limit(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        if event["level"] != "warning" or "error" not in event:
            return event
        line, now = repr(event), monotonic()
        for old in [old for old, one in repeating.items() if now - one.seen_at > REPEATS_WITHIN]:
            del repeating[old]
        one = repeating.get(line)
        if one is None:
            repeating[line] = _Repetition(now, now)
            return event
        one.seen_at = now
        if now - one.written_at < REPEATED_EVERY:
            one.dropped += 1
            raise structlog.DropEvent
        event["repeated"] = one.dropped
        repeating[line] = _Repetition(now, now)
        return event

    return limit


def _make_visible(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Make the values printable on a terminal; other values than texts by their repr."""
    return {
        key: visible(value) if isinstance(value, str) else value for key, value in event.items()
    }


def _write_traceback(file: TextIO, error: ExcInfo) -> None:
    """Indent tracebacks, so that no line of an error's text looks like a line of the log."""
    written = io.StringIO()
    structlog.dev.plain_traceback(written, error)
    lines = written.getvalue().strip("\n").split("\n")
    file.writelines(f"\n    {visible(line)}" for line in lines)


def _finish(render: Processor, redact: Callable[[str], str]) -> Processor:
    """Return the last processor: it renders a line without secrets, with its priority."""
    in_journal = is_journal()

    def finish(logger: WrappedLogger, method: str, event: EventDict) -> str:
        priority = _PRIORITIES[event["level"]]
        line = redact(str(render(logger, method, event)))
        return f"<{priority}>{line}" if in_journal else line

    return finish


class _Stderr(io.TextIOBase):
    """Standard error; a line that cannot be written is dropped, so that a full disk or a closed
    pipe has no other effect.
    """

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


_STDERR = cast(TextIO, _Stderr())


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger().bind(logger=record.name)
        error = record.exc_info and record.exc_info[1]
        if isinstance(error, TRANSIENT_ERRORS):  # one line is enough
            log.log(record.levelno, record.getMessage(), error=type(error).__name__)
        else:
            log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)
