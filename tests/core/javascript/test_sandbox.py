"""The sandbox: limits that hold, and evaluations that leave no trace."""

from __future__ import annotations

import hashlib
import itertools
import json
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from _quickjs import Context

from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.javascript import sandbox
from sequencerd.core.javascript.conditions import COMMANDS, Operand, compile_predicate
from sequencerd.core.javascript.templates import compile_template

LARGE = [{"length": 1e15}, {"length": 2**40, "0": 1}]


def holds(command: str, value: object, other: object, view: object = None) -> bool:
    operands = [
        operand if isinstance(operand, Operand) else Operand(type="raw", value=operand)
        for operand in (value, other)
    ]
    return compile_predicate(command, *operands)(json.dumps(view or {}))


def at(path: object) -> Operand:
    return Operand(type="get", value=path)


def everything_answers() -> None:
    assert holds("gt", at("data.n"), 1, {"data": {"n": 2}}) is True
    assert holds("isEqual", at("data"), {"a": []}, {"data": {"a": []}}) is True
    assert holds("isEmpty", at("data"), None, {"data": {}}) is True
    assert holds("has", at("data"), "polluted", {"data": {}}) is False
    assert holds("hasIn", at("data"), "polluted", {"data": {}}) is False
    template = compile_template("{{name}}{{polluted}}{{#each l}}{{this}}{{/each}}", escape=True)
    assert template.render({"name": "<", "l": [1, 2]}) == "&lt;12"


@pytest.mark.parametrize(
    ("command", "value", "other"),
    [
        ("range", 1e9, None),
        ("times", 1e9, None),
        ("repeat", "ab", 1e9),
        ("padStart", "a", 2e9),
        ("fill", {"length": 2**40}, 1),
        ("toArray", {"length": 2**40}, None),
        ("every", {"length": 2**40}, "a"),
        ("chunk", list(range(1000)), 1e-300),
        *[("join", value, "") for value in LARGE],
        *[("reverse", value, None) for value in LARGE],
        *[("pullAt", value, [0, 1, 2]) for value in LARGE],
        *[("invokeMap", LARGE, at(f"data.{name}")) for name in ("join", "splice", "lastIndexOf")],
        ("invokeMap", ["a"] * 1000, at("data.constructor.prototype.fill")),
        ("words", "a" * 200_000 + "\u0301", None),
        ("trim", "a" + "\u0301" * 200_000, "a"),
        ("invokeMap", "x" * 2_000, "a." * 2_000),
        ("attempt", at("data.constructor.name.constructor.raw"), {"raw": LARGE[0]}),
        ("invokeMap", [{"length": 10**6}] * 1_000, at("data.sort")),
        ("map", ["a" * 20_000_000] + ["a"] * 3_000, at("command.constructor.fromCharCode")),
        ("pull", [1] * 300_000, 1),
        ("includes", "a" * 300_000, "a" * 150_000 + "b"),
        ("split", "a" * 300_000, "a" * 150_000 + "b"),
        ("truncate", "a" * 300_000, {"length": 299_000, "separator": "a" * 150_000 + "b"}),
    ],
)
@pytest.mark.usefixtures("little_time")
def test_no_command_exceeds_the_limits_of_time_and_memory(
    command: str, value: object, other: object
) -> None:
    began = time.process_time()
    with suppress(EvaluationError):
        holds(command, value, other, {"data": [], "command": command})
    assert time.process_time() - began < 3
    everything_answers()


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("command", ["isEqual", "flattenDeep", "cloneDeep", "toString", "gt"])
def test_data_nested_without_end_is_reported(command: str) -> None:
    predicate = compile_predicate(command, at("data.a"), at("data.b"))
    with pytest.raises(EvaluationError, match="nested too deep") as caught:
        predicate(f'{{"data":{{"a":{nested(500_000)},"b":{nested(500_000)}}}}}')
    assert caught.value.failure == "bad_data"
    everything_answers()


def test_a_limit_is_reported_with_the_command() -> None:
    with pytest.raises(EvaluationError, match=r"lodashCommand range: more than 0\.25") as caught:
        holds("range", 1e9, None)
    assert caught.value.failure == "bad_data"
    everything_answers()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ab" * 10_000, "ab" * 5_000),
        ("ab" * 10_000, "ba" * 5_000 + "b"),
        ("aab" * 7_000 + "aaab" + "aab" * 5_000, "aab" * 4_000 + "aa"),
        ("a" * 9_999 + "b" + "a" * 10_001, "a" * 10_000),
        ("a" * 20_000, "a" * 10_000),
        ("a" * 20_000, "a" * 10_000 + "b"),
        ("xyz" + "\U0001f600" * 12_000 + "xyz", "\U0001f600" * 9_000 + "\ud83d"),
    ],
)
def test_long_texts_are_searched_as_others(text: str, wanted: str) -> None:
    assert len(text) * len(wanted) > 1e8  # then the sandbox searches by itself
    context = sandbox._current()._context
    text, wanted = json.dumps(text), json.dumps(wanted)
    seen = context.eval(f"""(() => {{
        const [text, wanted] = [{text}, {wanted}];
        return JSON.stringify([text.indexOf(wanted), text.indexOf(wanted, 2),
            text.lastIndexOf(wanted), text.split(wanted)]);
    }})()""")
    found = [
        Context().eval(f"{text}.{call}")
        for call in (f"indexOf({wanted})", f"indexOf({wanted}, 2)", f"lastIndexOf({wanted})")
    ]
    parts = Context().eval(f"JSON.stringify({text}.split({wanted}))")
    assert json.loads(seen) == [*found, json.loads(parts)]


@pytest.mark.parametrize(
    "code",
    [
        "while (true) {}",
        "/^(a+)+$/.test('a'.repeat(40) + 'b')",
        "(function again() { return again() + 1 })()",
        "'a'.repeat(1e9)",
        "for (let all = [];;) all.push('x'.repeat(1000) + all.length)",
        "JSON.parse('['.repeat(1e6))",
    ],
)
def test_every_evaluation_can_be_stopped(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sandbox._current()
    with pytest.raises(Exception, match=r"interrupted|memory|stack|null") as caught:
        made._context.eval(code)
    monkeypatch.setattr(made, "is_new", True)  # no other has left it in memory
    with pytest.raises(sandbox.LimitError):
        sandbox._judge(made, code, caught.value)
    assert sandbox._current() is not made
    everything_answers()


def test_exhausted_memory_of_the_machine_is_not_the_fault_of_the_data() -> None:
    template = compile_template("{{n}}", escape=True)
    large = '{"n":1,"text":"' + "x" * 40_000_000 + '"}'
    assert template.render(large) == "1"
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 16_000_000, hard))
    try:
        with pytest.raises(MemoryError):
            template.render(large)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    everything_answers()


@pytest.mark.parametrize(
    "source",
    [
        '{{#*inline "p"}}{{> p}}{{/inline}}{{> p}}',  # calls itself
        '{{#*inline "p"}}{{> p}}{{> p}}{{/inline}}{{> p}}',
        "{{#each l}}{{#each @root.l}}{{#each @root.l}}{{/each}}{{/each}}{{/each}}",
        "{{#each l}}{{@root.text}}{{/each}}",
        "{{#each l}}{{#if (json @root)}}{{/if}}{{/each}}",
        "{{#each l}}{{json @root}}{{/each}}",
        "{{nested}}",
    ],
)
@pytest.mark.usefixtures("little_time")
def test_a_rendering_that_takes_too_much_fails(source: str) -> None:
    context = f'{{"l":{list(range(20_000))},"text":"{"é" * 2_000}","nested":{nested(9_000)}}}'
    with pytest.raises(EvaluationError) as caught:
        compile_template(source, escape=True).render(context)
    assert caught.value.failure == "bad_data"
    everything_answers()


@pytest.mark.usefixtures("little_time")
def test_a_helper_that_reads_much_is_stopped_before_it_is_called_often() -> None:
    source = "{{#each l}}{{#if (upper @root.text)}}{{/if}}{{/each}}"
    template = compile_template(source, escape=True)
    began = time.process_time()
    with pytest.raises(EvaluationError, match="seconds of computing"):
        template.render(f'{{"l":{list(range(1_000))},"text":"{"é" * 20_000_000}"}}')
    assert time.process_time() - began < 2
    everything_answers()


def test_fifty_megabytes_are_refused_at_once() -> None:
    template = compile_template("{{#each l}}{{@root.text}}{{/each}}", escape=True)
    began = time.process_time()
    with pytest.raises(EvaluationError, match=r"1048576 characters|seconds|memory"):
        template.render({"l": list(range(1_000)), "text": "<" * 50_000})
    assert time.process_time() - began < 5
    everything_answers()


def test_no_command_changes_the_data_that_the_next_one_reads() -> None:
    data = {"list": [3, 1, 2], "one": 1, "key": "a", "nested": {"a": {"b": [1]}}}
    view = json.dumps({"data": data})
    same = compile_predicate("isEqual", at("data"), Operand(type="raw", value=data))
    operands = [("list", "one"), ("nested", "key"), ("list", "list"), ("nested", "list")]
    for command, (value, other) in itertools.product(sorted(COMMANDS), operands):
        assert same(view), command  # parsed and kept
        predicate = compile_predicate(command, at(f"data.{value}"), at(f"data.{other}"))
        with suppress(EvaluationError):
            predicate(view)
        assert same(view), command


def test_a_raw_operand_is_new_in_each_evaluation() -> None:
    predicate = compile_predicate(
        "isEmpty", Operand(type="raw", value={"a": [1]}), Operand(type="raw", value=None)
    )
    assert predicate("{}") is False
    for command in ("set", "unset", "merge", "assign", "pull", "remove", "fill", "update"):
        change = compile_predicate(
            command,
            Operand(type="raw", value={"a": [1]}),
            Operand(type="raw", value="a"),
        )
        shown = [change.operands("{}") for _ in range(2) if change("{}") in (True, False)]
        assert shown == [('{"a":[1]}', '"a"')] * 2


@pytest.mark.parametrize(
    "data",
    [
        '{"__proto__": {"polluted": 1}}',
        '{"constructor": {"prototype": {"polluted": 1}}}',
        '{"a": {"__proto__": {"polluted": 1}}}',
        '{"toString": 1, "valueOf": 2, "hasOwnProperty": 3}',
        '{"__defineGetter__": 1, "__lookupGetter__": 1}',
    ],
)
def test_keys_of_data_change_no_prototype(data: str) -> None:
    view = {"data": json.loads(data), "list": [], "new": {}}
    for command in ("merge", "defaultsDeep", "assign", "assignIn", "defaults", "set", "create"):
        for path in ("new", "constructor", "list", "list.constructor"):
            with suppress(EvaluationError):
                holds(command, at(path), at("data"), view)
            everything_answers()
    source = "{{#each data}}{{@key}}{{#each this}}{{@key}}{{/each}}{{/each}}{{json data}}"
    compile_template(source, escape=True).render(f'{{"data":{data}}}')
    everything_answers()


@pytest.mark.parametrize("path", ["constructor", "__proto__", "list.__proto__", "text.constructor"])
def test_prototypes_cannot_be_changed(path: str) -> None:
    view = {"list": [], "text": "", "change": {"polluted": 1, "map": 0}}
    for command in ("assign", "merge", "defaults", "assignIn", "defaultsDeep"):
        with suppress(EvaluationError):
            holds(command, at(path), at("change"), view)
        everything_answers()
    for command, change in (("set", "polluted"), ("unset", "prototype.map"), ("unset", "map")):
        with suppress(EvaluationError):
            holds(command, at(path), change, view)
    assert holds("map", at("list"), None, {"list": []}) is True
    everything_answers()


def test_everything_that_a_path_reaches_is_frozen() -> None:
    holds("eq", 1, 1)  # makes the context
    context = sandbox._current()._context
    reached, changeable = json.loads(
        context.eval("""(() => {
            const reached = new Set();
            const changeable = [];
            function walk(value, path) {
                if (Object(value) !== value || reached.has(value)) return;
                reached.add(value);
                if (!Object.isFrozen(value)) changeable.push(path);
                visit(value, path);
            }
            function visit(value, path) {
                for (let at = Object(value); at; at = Object.getPrototypeOf(at)) {
                    for (const key of Object.getOwnPropertyNames(at)) {
                        let found;
                        try {
                            found = value[key];
                        } catch {
                            continue;
                        }
                        walk(found, `${path}.${key}`);
                    }
                }
            }
            for (const value of [{}, [], "", 0, true]) visit(value, typeof value);
            return JSON.stringify([reached.size, changeable]);
        })()""")
    )
    assert reached > 100
    assert changeable == []


@pytest.mark.parametrize("name", ["hasOwnProperty", "toString", "valueOf", "constructor.keys"])
def test_functions_that_all_objects_inherit_cannot_be_changed(name: str) -> None:
    assert holds("assign", at(f"data.{name}"), {"left": 1}, {"data": {}}) is True
    assert holds("isNil", at(f"data.{name}.left"), None, {"data": {}}) is True


def test_an_object_may_have_keys_that_others_inherit() -> None:
    view = {"data": {"constructor": "Ferrari", "toString": "x"}}
    source = '{{#*inline "p"}}{{constructor}} {{n}}{{/inline}}{{> p data n=1}}'
    assert compile_template(source, escape=True).render(view) == "Ferrari 1"
    assert holds("isEqual", at("data.constructor"), "Ferrari", view) is True


def test_nothing_is_random_and_no_clock_is_read() -> None:
    shuffled = compile_predicate("shuffle", Operand(type="raw", value=list(range(20))), None)
    assert shuffled("{}") is True
    for path in ("Date", "performance", "Math", "globalThis"):
        assert holds("isNil", at(path), None) is True


def test_garbage_of_other_evaluations_does_not_fail_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # lodash remembers the last paths: these fill the memory of the context
    monkeypatch.setattr(sandbox, "MEMORY_LIMIT", 6 * 1024 * 1024)
    monkeypatch.setattr(sandbox, "_THREAD", sandbox._Thread())
    for number in range(40):
        path = f"a[{number}]" + ".b" * 4_000
        assert holds("get", at("data"), at("data.path"), {"data": {"path": path}}) is False


def test_each_thread_has_its_own_sandbox() -> None:
    predicate = compile_predicate("gte", at("data.n"), Operand(type="raw", value=5))
    template = compile_template("{{#each data.l}}{{this}}{{/each}}", escape=True)

    def work(number: int) -> tuple[bool, str]:
        view = json.dumps({"data": {"n": number, "l": [number]}})
        return predicate(view), template.render(view)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(400))) == [(n >= 5, str(n)) for n in range(400)]


def test_the_libraries_are_those_of_the_list() -> None:
    vendor = files("sequencerd.core.javascript").joinpath("vendor")
    lines = vendor.joinpath("VERSIONS").read_text().splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [
        ["lodash", "4.18.1"],
        ["handlebars", "4.7.10"],
    ]
    for line in lines:
        *_, digest, name = line.split()
        assert hashlib.sha256(vendor.joinpath(name).read_bytes()).hexdigest() == digest
        assert vendor.joinpath(name.rpartition(".")[0] + ".LICENSE").is_file()


def test_a_program_without_conditions_loads_no_engine(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("name: s\nsteps: [{name: a, type: GoTo}]")
    code = """
import sys
from sequencerd.cli import main
for arguments in (["--version"], ["check", "file.yaml"]):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, ended.code
    assert "_quickjs" not in sys.modules, arguments
import sequencerd.daemon, sequencerd.console
assert "_quickjs" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_program_that_is_too_large_is_seldom_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = compile_template("{{data.name}}" * 500, escape=True)
    made: list[str] = []
    make = sandbox._Sandbox.make

    def counting(self: sandbox._Sandbox, maker: str, *more: Any, **options: Any) -> object:
        made.append(maker)
        return make(self, maker, *more, **options)

    monkeypatch.setattr(sandbox._Sandbox, "make", counting)
    monkeypatch.setattr(sandbox._THREAD, "sandbox", None)
    with monkeypatch.context() as busy:
        busy.setattr(sandbox, "COMPILE_SECONDS", 0.01)
        for attempts in (1, 1, 2, 2, 2, 2, 3):
            with pytest.raises(EvaluationError, match=r"more than 0\.01 seconds of computing"):
                template.render('{"data":{}}')
            assert made == ["template"] * attempts
    everything_answers()
    with pytest.raises(EvaluationError, match="seconds of computing"):
        template.render('{"data":{}}')
    for _ in range(7):
        with suppress(EvaluationError):
            template.render('{"data":{}}')
    for _ in range(2):
        assert template.render('{"data":{"name":"x"}}') == "x" * 500
    assert template.program not in sandbox._REFUSED


def test_a_template_that_cannot_be_read_in_time_is_seldom_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, made = "{{data.name}} " * 500, 0
    make = sandbox._Sandbox.make

    def counting(self: sandbox._Sandbox, maker: str, *more: Any, **options: Any) -> object:
        nonlocal made
        made += 1
        return make(self, maker, *more, **options)

    monkeypatch.setattr(sandbox._Sandbox, "make", counting)
    before = sandbox.refusals()
    with monkeypatch.context() as busy:
        busy.setattr(sandbox, "COMPILE_SECONDS", 0.01)
        for number, attempts in enumerate((1, 1, 2, 2, 2, 2, 3), 1):
            with pytest.raises(DefinitionError, match=r"more than 0\.01 seconds of computing"):
                compile_template(source, escape=True)
            assert made == attempts
            assert sandbox.refusals() == before + number
    for _ in range(7):
        with pytest.raises(DefinitionError, match="seconds of computing"):
            compile_template(source, escape=True)
    assert compile_template(source, escape=True).surely_reads == {"data.name"}
    assert json.dumps(source) not in sandbox._REFUSED
