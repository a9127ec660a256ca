"""Custom runners whose steps name a recipient."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from sequencerd.core.faults import DefinitionError
from sequencerd.core.task import Answer, Failed, Suppressed, Task
from sequencerd.runners import runner
from sequencerd.runners.addressed import AddressedRunner
from sequencerd.runners.protocol import NotNow
from sequencerd.runners.python import PythonRunner
from sequencerd.runners.suppression_check import SuppressionKey, Suppressions
from tests.helpers.engines import Recorder

PUSH = {"channel": "push", "address": "{{data.token}}", "title": "Hi"}


def suppressing(*entries: SuppressionKey) -> Suppressions:
    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        return set(entries) & set(keys)

    return Suppressions(ask)


def task(number: int, topic: str | None = None, **data: Any) -> Task:
    return Task(f"{number}:1:x", {"subject": f"user-{number}", "data": data}, None, topic)


async def test_the_runner_gets_the_tasks_that_are_not_suppressed() -> None:
    recorder = Recorder()
    entries = (("push", "b", "*"), ("push", "c", "news"), ("push", "user-4", "*"))
    made = AddressedRunner(recorder, suppressing(*entries))
    given = (("a", "news"), (" b ", None), ("c", "news"), ("d", None), ("c", None))
    tasks = [task(number, topic, token=t) for number, (t, topic) in enumerate(given, 1)]
    assert await made.run(made.compile(PUSH), tasks) == [
        Answer(),
        Suppressed("not sent to  b "),
        Suppressed("not sent to c (topic news)"),
        Suppressed("not sent to user-4"),
        Answer(),
    ]
    assert recorder.keys == ["1:1:x", "5:1:x"]
    assert recorder.programs[0] == PUSH  # which the runner may read
    (held,) = await made.run(made.compile(PUSH), tasks[1:2])
    assert isinstance(held, Suppressed)
    assert len(recorder.keys) == 2


async def test_addresses_of_other_channels_are_compared_as_they_are() -> None:
    made = AddressedRunner(Recorder(), suppressing(("push", "abc", "*"), ("email", "a@x.org", "*")))
    assert await made.run(made.compile(PUSH), [task(1, token="ABC")]) == [Answer()]
    mail = made.compile({"channel": "email", "address": "{{data.token}}"})
    assert await made.run(mail, [task(1, token="A@X.org")]) == [Suppressed("not sent to A@X.org")]


async def test_a_single_key_of_an_address_belongs_to_the_runner() -> None:
    recorder = Recorder()
    made = AddressedRunner(recorder, suppressing(("#general", "x", "*")))
    for own in ({"channel": "#general"}, {"address": ["x"]}, {}):
        assert await made.run(made.compile(own), [task(1)]) == [Answer()]
        assert recorder.programs.pop() == own


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"channel": "#general", "address": "x"}, "channel: must be 1 to 100 lower-case letters"),
        ({"channel": "push", "address": ["x"]}, "address: must be a text"),
        ({"channel": "push", "address": "{{data.x"}, "address: line 1"),
        ({"channel": "push", "address": 5, "bad": 1}, "bad: this key is not known"),
    ],
)
def test_errors_are_reported_with_the_runners_own_errors(
    config: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(DefinitionError, match=message):
        AddressedRunner(Recorder(), None).compile(config)


async def test_an_address_that_cannot_be_rendered_fails_its_enrollment_alone() -> None:
    made = AddressedRunner(Recorder(), suppressing())
    program = made.compile({**PUSH, "address": "{{date data.due}}"})
    good, bad = await made.run(program, [task(1, due="2030-01-01"), task(2, due="soon")])
    assert good == Answer()
    assert isinstance(bad, Failed)
    assert bad.permanent
    assert bad.failure == "bad_data"


async def test_while_the_list_cannot_be_read_nothing_is_sent() -> None:
    async def ask(_: list[SuppressionKey]) -> set[SuppressionKey]:
        raise NotNow("the suppressions cannot be read")

    recorder = Recorder()
    made = AddressedRunner(recorder, Suppressions(ask))
    with pytest.raises(NotNow):
        await made.run(made.compile(PUSH), [task(1, token="a")])
    assert not recorder.keys


async def test_a_model_need_not_have_the_common_keys() -> None:
    class Strict(BaseModel, extra="forbid"):
        title: str
        channel: str

    @runner(config=Strict)
    async def push(config: Strict, _runner: Mapping[str, Any]) -> str:
        assert config.channel == "push"
        return "altNext"

    made = PythonRunner(push, name="Push")
    assert made.compile({**PUSH, "topic": "news"}) == Strict(title="Hi", channel="push")
    with pytest.raises(DefinitionError, match="titel"):
        made.compile({**PUSH, "titel": "x"})


async def test_an_error_that_no_runner_waits_for_is_not_logged() -> None:
    """As at a stop while the database is away."""

    async def ask(_: object) -> set[SuppressionKey]:
        asked.set()
        await away.wait()
        raise NotNow("the database is away")

    asked, away = asyncio.Event(), asyncio.Event()
    logged: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    runner = asyncio.create_task(Suppressions(ask).find_suppressed("email", ["a@x.org"], None))
    await asked.wait()
    (query,) = asyncio.all_tasks() - {runner, asyncio.current_task()}
    runner.cancel()
    await asyncio.wait([runner])
    away.set()
    await asyncio.wait([query])
    del query
    gc.collect()
    assert logged == []
