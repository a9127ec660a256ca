"""Make the runners of all step types from the settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sequencerd.core.step_types import BUILT_IN
from sequencerd.core.step_types.effects import EMAIL, SMS
from sequencerd.errors import SettingsError
from sequencerd.runners.addressed import AddressedRunner
from sequencerd.runners.aws_lambda import MAX_EVENT, LambdaFunction
from sequencerd.runners.email.runner import EmailRunner
from sequencerd.runners.http import BATCH_BYTES, BatchRunner, Endpoint, HttpEndpoint
from sequencerd.runners.pace import TakePermits
from sequencerd.runners.protocol import Runner
from sequencerd.runners.python import load
from sequencerd.runners.sms.runner import SmsRunner
from sequencerd.runners.suppression_check import Suppressions
from sequencerd.runners.unsubscribe import UnsubscribeLinks
from sequencerd.settings import (
    HttpRunnerSettings,
    LookupSettings,
    Settings,
    secret_values,
)


def make_runners(
    settings: Settings, suppressions: Suppressions | None = None, take: TakePermits | None = None
) -> dict[str, Runner]:
    """Return every runner that is installed or configured, by step type. Raises SettingsError.

    `suppressions` are checked before each message; without it, the runners can only compile
    configs. `take` takes permits that all daemons share; without it, rates apply to this process
    alone.
    """
    try:
        links = make_links(settings)
        runners: dict[str, Runner] = {}
        with _section("email"):
            runners[EMAIL.name] = EmailRunner(
                settings.email, suppressions=suppressions, links=links, take=take
            )
        with _section("sms"):
            runners[SMS.name] = SmsRunner(
                settings.sms, suppressions=suppressions, links=links, take=take
            )
        installed = load()
        _check_names(installed, "the Python runner {}")
        _check_names(settings.runners, "[runners.{}]")
        runners |= {name: AddressedRunner(one, suppressions) for name, one in installed.items()}
        for name, endpoint in settings.runners.items():
            runner = BatchRunner(
                make_endpoint(f"runners.{name}", endpoint),
                name=name,
                limits=endpoint.limits,
                batch_bytes=endpoint.batch_bytes or (MAX_EVENT if endpoint.arn else BATCH_BYTES),
                retry=endpoint.retry,
                take=take,
            )
            runners[name] = AddressedRunner(runner, suppressions)
    except ValueError as error:
        raise SettingsError(f"wrong setting: {error}") from error
    return runners


def make_endpoint(section: str, settings: HttpRunnerSettings | LookupSettings) -> Endpoint:
    """Return the destination for calls of a runner or a lookup. Raises SettingsError."""
    with _section(section):
        if settings.arn is not None:
            return LambdaFunction(
                settings.arn,
                timeout=settings.timeout,
                connections=settings.concurrency,
                allow_private=settings.allow_private,
            )
        own = settings if isinstance(settings, HttpRunnerSettings) else None
        return HttpEndpoint(
            settings.url or "",
            timeout=settings.timeout,
            connections=settings.concurrency,
            secret=own.secret.get_secret_value() if own and own.secret else None,
            headers=secret_values(settings.headers),
            allow_private=settings.allow_private,
            http2=own is not None and own.http2,
        )


@contextmanager
def _section(name: str) -> Iterator[None]:
    """Name the section of the settings in which something is wrong. Raises SettingsError."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(f"wrong setting: {name}: {error}") from error


def _check_names(names: Iterable[str], shown: str) -> None:
    """Raise ValueError if a runner has the name of a built-in step type."""
    for name in names:
        if name in BUILT_IN:
            raise ValueError(
                f"{shown.format(name)}: {name} is a built-in step type, choose another name"
            )


def make_links(settings: Settings) -> UnsubscribeLinks | None:
    """Return the maker and reader of links to unsubscribe, if it is configured."""
    section = settings.unsubscribe
    if section is None:
        return None
    return UnsubscribeLinks(section.url, [key.get_secret_value() for key in section.keys])
