"""Log with structlog, on standard error: as JSON for programs, as columns for a terminal.

From the level "info" on, a line names enrollments, sequences and steps, but nothing personal: data,
addresses and servers' answers are in the history, and at the level "debug". No line contains a
secret from the settings.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TextIO, cast
from urllib.parse import unquote, urlsplit

import asyncpg
import structlog
from structlog.typing import EventDict, ExcInfo, FilteringBoundLogger, Processor, WrappedLogger

from sequencerd.core.describe import visible
from sequencerd.errors import SettingsError
from sequencerd.service.systemd import is_journal
from sequencerd.settings import Settings
from sequencerd.storage import conninfo

MIN_SECRET_LENGTH = 4  # characters; masking shorter secrets would mask parts of most lines

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def make_log(settings: Settings) -> FilteringBoundLogger:
    """Return the logger for all parts of the program. A later call reconfigures all loggers made
    before.
    """
    form = settings.log.format
    is_terminal = sys.stderr.isatty()
    render: Processor
    if form == "text" or (form == "auto" and is_terminal):
        # not rich's tracebacks, which show the values of variables
        render = structlog.dev.ConsoleRenderer(
            colors=is_terminal, exception_formatter=_write_traceback
        )
    else:
        render = structlog.processors.JSONRenderer(default=str)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _make_visible
            if isinstance(render, structlog.dev.ConsoleRenderer)
            else _format_exception,
            _finish(render, sorted(set(_parts(settings.secrets())), key=len, reverse=True)),
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


_format_exception = structlog.processors.format_exc_info


def _finish(render: Processor, secrets: Iterable[str]) -> Processor:
    """Return the last processor: it renders a line without secrets, with its priority."""
    in_journal = is_journal()

    def finish(logger: WrappedLogger, method: str, event: EventDict) -> str:
        priority = _PRIORITIES[event["level"]]
        line = str(render(logger, method, event))
        for secret in secrets:
            line = line.replace(secret, "***")
        return f"<{priority}>{line}" if in_journal else line

    return finish


def _parts(secrets: Iterable[str]) -> Iterator[str]:
    """Return secrets and secret parts of URLs, in each form in which a line may have them."""
    for secret in secrets:
        parts = {secret, *secret.split(), *_passwords(secret)}
        for part in parts:
            if len(part) >= MIN_SECRET_LENGTH and part not in ("Bearer", "Basic"):
                yield part
                yield json.dumps(part)[1:-1]


def _passwords(url: str) -> Iterator[str]:
    with suppress(ValueError):
        if password := urlsplit(url).password:
            yield password
            yield unquote(password)
    with suppress(SettingsError):  # as written in the database's connection string
        if password := conninfo.parse(url).get("password"):
            yield password


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
        if isinstance(error, OSError | asyncpg.PostgresError):  # temporary: one line is enough
            log.log(record.levelno, record.getMessage(), error=type(error).__name__)
        else:
            log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)
