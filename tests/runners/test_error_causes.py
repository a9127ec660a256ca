"""What this machine has run out of is no message's fault."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from sequencerd.core.task import Failed
from sequencerd.runners.email.smtp import Mail, MailTransport
from sequencerd.runners.error_causes import causes, is_exhausted
from sequencerd.runners.python import PythonRunner
from tests.helpers.servers import no_descriptors, smtp_server, task


async def test_mail_without_descriptors_spends_no_attempt() -> None:
    async with smtp_server() as mailbox:
        url = f"smtp://127.0.0.1:{mailbox.port}?starttls=never"
        transport = MailTransport(url, connections=1, timeout=60)
        with no_descriptors():
            mail = Mail("a@example.com", ("b@example.com",), (), b"")
            result = (await transport.deliver(mail)).result
        await transport.close()
    assert isinstance(result, Failed)
    assert "Too many open files" in result.message
    assert (result.fault, result.permanent, result.unknown) == ("server", False, False)


async def test_a_function_without_descriptors_spends_no_attempt() -> None:
    async def function(_: Any, __: Any) -> None:
        with open("/dev/null"):  # noqa: ASYNC230, PTH123
            pass

    made = PythonRunner(function, name="Crm")
    with no_descriptors():
        (result,) = await made.run(made.compile({}), [task()])
    assert isinstance(result, Failed)
    assert result.fault == "server"


@pytest.mark.parametrize(
    "number",
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL],
)
def test_exhausted_resources(number: int) -> None:
    error = OSError(number, "...")
    assert is_exhausted(error)
    assert is_exhausted(RuntimeError(ExceptionGroup("several", [ValueError(), error])))
    assert not is_exhausted(OSError(errno.ECONNREFUSED, "..."))


def test_circular_causes() -> None:
    first, second = ValueError(), ValueError()
    first.args, second.args = (second,), (first,)
    assert list(causes(first)) == [first, second]
