"""Custom runners in Python."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections import UserList, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import Action, Limits, RetryPolicy
from sequencerd.core.task import Answer, Failed, Result, Undeliverable
from sequencerd.errors import SettingsError
from sequencerd.runners import Refused
from sequencerd.runners.python import PythonRunner, as_runner, load, runner
from sequencerd.runners.registry import make_runners
from sequencerd.settings import Settings
from tests.helpers.runners import failed
from tests.helpers.servers import KEY, task


async def run(function: Callable[..., Any], *ids: int, config: Any = None) -> list[Result]:
    """The results of a function."""
    made = PythonRunner(function, name="Coupon")
    results = await made.run(made.compile(config or {}), [task(id_) for id_ in ids or (7,)])
    await made.close()
    return list(results)


async def test_a_function_sees_the_config_and_the_enrollment() -> None:
    seen = []

    def coupon(config: Any, runner: Any) -> None:
        seen.append((config, runner["subject"], runner["idempotencyKey"], threading.get_ident()))

    assert await run(coupon, config={"percent": 5}) == [Answer()]
    ((config, subject, key, thread),) = seen
    assert (config, subject, key) == ({"percent": 5}, "user-7", KEY)
    assert thread != threading.get_ident()


async def test_an_async_function_runs_in_the_loop() -> None:
    async def coupon(config: Any, runner: Any) -> str:
        assert asyncio.get_running_loop() is loop
        return "altNext" if runner["id"] == 7 else "next"

    loop = asyncio.get_running_loop()
    assert await run(coupon, 7, 8) == [Answer(Action.ALT_NEXT), Answer()]


async def test_an_object_that_is_called() -> None:
    class Coupon:
        async def __call__(self, config: Any, runner: Any) -> str:
            return "noop"

    assert await run(Coupon()) == [Answer(Action.NOOP)]


@pytest.mark.parametrize(
    ("answered", "result"),
    [
        (None, Answer()),
        ("next", Answer()),
        (Action.ALT_NEXT, Answer(Action.ALT_NEXT)),
        ({"message": "done"}, Answer(message="done")),
        ({"action": "noop", "retryAfter": 5}, Answer(Action.NOOP, retry_after=timedelta(0, 5))),
        (
            {"action": "noop", "wakeAt": datetime(2030, 1, 1, tzinfo=UTC), "data": {"a": 1}},
            Answer(Action.NOOP, data={"a": 1}, wake_at=datetime(2030, 1, 1, tzinfo=UTC)),
        ),
    ],
)
async def test_valid_answers_of_functions(answered: Any, result: Result) -> None:
    assert await run(lambda config, runner: answered) == [result]


@pytest.mark.parametrize(
    ("answered", "says"),
    [
        ("jump", "unknown action 'jump'"),
        (5, "of type int"),
        ({"action": "jump"}, "action: "),
        ({"acton": "next"}, "acton: "),
        ({"data": {"a": object()}}, "data: not JSON"),
        ({"wakeAt": datetime(2030, 1, 1)}, "wakeAt: write the offset"),  # noqa: DTZ001 - the point
    ],
)
async def test_invalid_answers_of_functions(answered: Any, says: str) -> None:
    bad = failed((await run(lambda config, runner: answered))[0])
    assert not bad.permanent
    assert says in bad.message
    assert bad.message.startswith("Coupon: ")


@pytest.mark.parametrize("error", [ValueError("no\nway"), SystemExit(1), KeyError("x")])
@pytest.mark.parametrize("is_async", [True, False])
async def test_exceptions_of_functions_are_retried(error: BaseException, is_async: bool) -> None:
    def coupon(config: Any, runner: Any) -> None:
        raise error

    async def later(config: Any, runner: Any) -> None:
        raise error

    results = await run(later if is_async else coupon)
    assert (failed(results[0]).permanent, failed(results[0]).fault) == (False, "unclear")
    assert failed(results[0]).message.startswith(f"Coupon: {type(error).__name__}: ")
    assert "later, line" in failed(results[0]).message or not is_async


@pytest.mark.parametrize("is_async", [True, False])
async def test_refused_fails_permanently(is_async: bool) -> None:
    def coupon(config: Any, runner: Any) -> None:
        raise Refused("no such customer")

    async def later(config: Any, runner: Any) -> None:
        coupon(config, runner)

    results = await run(later if is_async else coupon)
    assert results == [Failed("no such customer", permanent=True)]


async def test_a_function_that_cancels_itself_cancels_nothing_else() -> None:
    async def coupon(config: Any, runner: Any) -> None:
        raise asyncio.CancelledError

    assert "CancelledError" in failed((await run(coupon))[0]).message


async def test_a_batch_has_an_answer_for_each_or_none() -> None:
    @runner(batch_size=1000, concurrency=2, timeout=5)
    async def coupons(config: Any, runners: list[Any]) -> Any:
        return config["answer"] and [config["answer"]] * (len(runners) - config.get("less", 0))

    made = PythonRunner(coupons, name="Coupon")
    assert made.limits == Limits(2, 5, 1000)
    assert await run(coupons, 1, 2, config={"answer": "altNext"}) == [Answer(Action.ALT_NEXT)] * 2
    assert await run(coupons, 1, 2, config={"answer": None}) == [Answer()] * 2
    short = await run(coupons, 1, 2, config={"answer": "next", "less": 1})
    assert ["1 item for 2" in failed(result).message for result in short] == [True, True]


async def test_a_batch_is_judged_one_by_one() -> None:
    @runner(batch_size=10)
    def coupons(config: Any, runners: list[Any]) -> Any:
        return ["next", 5, {"action": "noop"}]

    results = await run(coupons, 1, 2, 3)
    assert results[0] == Answer()
    assert "of type int" in failed(results[1]).message
    assert results[2] == Answer(Action.NOOP)


@pytest.mark.parametrize("answer", ["next", {"1": "next"}, 5])
async def test_a_batch_that_answers_no_list(answer: Any) -> None:
    @runner(batch_size=10)
    def coupons(config: Any, runners: list[Any]) -> Any:
        return answer

    assert ["not a list" in failed(r).message for r in await run(coupons, 1, 2)] == [True, True]


async def test_a_batch_that_raises() -> None:
    @runner(batch_size=10)
    async def coupons(config: Any, runners: list[Any]) -> Any:
        raise Refused("all of you")

    assert await run(coupons, 1, 2) == [Failed("all of you", permanent=True)] * 2


async def test_a_config_is_validated_by_the_model() -> None:
    class Config(BaseModel):
        percent: int

    @runner(config=Config)
    def coupon(config: Config, runner: Any) -> Any:
        return {"message": f"{config.percent + 1}"}

    assert await run(coupon, config={"percent": 5}) == [Answer(message="6")]
    with pytest.raises(DefinitionError, match="percent: "):
        PythonRunner(coupon, name="Coupon").compile({"percent": "much"})


async def test_a_hanging_thread_occupies_only_its_own_slot() -> None:
    release = threading.Event()
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    @runner(concurrency=1)
    def stuck(config: Any, runner: Any) -> None:
        loop.call_soon_threadsafe(started.set)
        release.wait()

    made = PythonRunner(stuck, name="Stuck")
    first = asyncio.create_task(made.run({}, [task(1)]))
    await started.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(made.run({}, [task(2)]))
    assert await run(lambda config, runner: None) == [Answer()]
    assert not second.done()
    release.set()
    assert list(await second) == [Answer()]


# --- entry points


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, points: str, code: str, name: str = "shop"
) -> None:
    """Puts a package with these entry points on the path."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sequencerd.runners]\n{points}\n")
    (folder / f"{name}_runners.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, f"{name}_runners", raising=False)
    importlib.invalidate_caches()


async def test_runners_of_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def coupon(config, runner):\n    return 'altNext'\n"
    install(tmp_path, monkeypatch, "Coupon = shop_runners:coupon", code)
    made = load()["Coupon"]
    assert await made.run(made.compile({}), [task()]) == [Answer(Action.ALT_NEXT)]


@pytest.mark.parametrize(
    ("points", "code", "says"),
    [
        ("Coupon = shop_runners:missing", "", "'Coupon' .shop_runners:missing. cannot be loaded"),
        ("Coupon = shop_runners:x", "raise OSError('no')", "OSError: no"),
        ("Coupon = shop_runners:x", "x = 5", "'Coupon' is not a function"),
        ("Coupon = shop_runners:X", "class X: pass", "'Coupon' is not a function"),
    ],
)
def test_packages_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: str, code: str, says: str
) -> None:
    install(tmp_path, monkeypatch, points, code)
    with pytest.raises(ValueError, match=says):
        load()


def test_two_packages_with_the_same_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def coupon(config, runner):\n    pass\n"
    for name in ("shop", "store"):
        install(tmp_path, monkeypatch, f"Coupon = {name}_runners:coupon", code, name)
    with pytest.raises(ValueError, match="two packages"):
        load()


def test_a_package_with_the_name_of_a_built_in_type_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def go(config, runner):\n    pass\n"
    install(tmp_path, monkeypatch, "GoTo = shop_runners:go", code)
    with pytest.raises(SettingsError, match="the Python runner GoTo: GoTo is a built-in step type"):
        make_runners(Settings())


def test_an_object_that_is_a_runner_is_taken_as_it_is() -> None:
    made = PythonRunner(lambda config, runner: None, name="x")
    assert as_runner(made, name="y").limits is made.limits


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"concurrency": 0}, {"timeout": 0}])
def test_limits_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        runner(**wrong)


@pytest.mark.parametrize("year", [1899, 9999])
async def test_a_time_that_the_database_does_not_take_is_an_answer_that_cannot_be_used(
    year: int,
) -> None:
    wake = datetime(year, 6, 1, tzinfo=UTC)

    async def as_object(config: Any, runner: Any) -> dict[str, Any]:
        return {"action": "noop", "wakeAt": wake.isoformat()}

    async def as_answer(config: Any, runner: Any) -> Answer:
        return Answer(Action.NOOP, wake_at=wake)

    for function in (as_object, as_answer):
        (result,) = await run(function)
        assert "the answer cannot be used: wakeAt" in failed(result).message
        assert "write a time in the years 1900 to 9998" in failed(result).message


WRONG: Any = {  # what no type checker would allow
    "action": Answer(action="sideways", message="x"),  # type: ignore[arg-type]
    "message": Answer(message=5),  # type: ignore[arg-type]
    "data": Answer(data=[1]),  # type: ignore[arg-type]
    "not JSON": Answer(data={"a": {1}}),
    "wakeAt": Answer(Action.NOOP, wake_at="2030"),  # type: ignore[arg-type]
    "retryAfter": Answer(Action.NOOP, retry_after=timedelta(days=-1)),
    "undeliverable": Answer(undeliverable="x"),  # type: ignore[arg-type]
    "wrong message": Failed(5),  # type: ignore[arg-type]
    "wrong retry_after": Failed("x", retry_after=5),  # type: ignore[arg-type]
    "wrong fault": Failed("x", fault="me"),  # type: ignore[arg-type]
}


class Own:
    """A Runner of a plug-in."""

    limits = Limits()
    retry = RetryPolicy()

    def __init__(self, result: Result, kind: Callable[..., Sequence[Result]] = list) -> None:
        self._result = result
        self._kind = kind

    def compile(self, config: Any) -> object:
        return config

    async def run(self, _: object, tasks: Any) -> Sequence[Result]:
        return self._kind(self._result for _ in tasks)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("words", WRONG)
async def test_results_that_an_author_has_made_are_checked(words: str) -> None:
    (of_function,) = await run(lambda *_: WRONG[words])
    assert words in failed(of_function).message
    for kind in (list, tuple, deque, UserList):
        own = as_runner(Own(WRONG[words], kind), name="Own")
        (of_runner,) = await own.run({}, [task(7)])
        assert words in failed(of_runner).message


async def test_right_results_that_an_author_has_made_stay() -> None:
    late = datetime(2030, 1, 1, tzinfo=UTC)
    for right in (
        Answer(),
        Answer(Action.ALT_NEXT, "well", {"a": 1}),
        Answer(Action.NOOP, wake_at=late),
        Answer(Action.NOOP, retry_after=timedelta(seconds=5)),
        Answer(undeliverable=(Undeliverable("email", "a@x.org", "gone"),)),
        Failed("why", retry_after=timedelta(seconds=5), fault="server"),
    ):
        assert await run(lambda *_, result=right: result) == [right]
        assert await as_runner(Own(right), name="Own").run({}, [task(7)]) == [right]


@pytest.mark.parametrize("in_thread", [True, False])
async def test_an_exception_without_a_text(in_thread: bool) -> None:
    class WithoutTextError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def wrong(*_: object) -> None:
        raise WithoutTextError

    async def wrong_too(*_: object) -> None:
        raise WithoutTextError

    (result,) = await run(wrong if in_thread else wrong_too)
    assert "WithoutTextError: (no text: RuntimeError)" in failed(result).message
