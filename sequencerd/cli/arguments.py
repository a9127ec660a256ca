"""The arguments of every command.

Parsing imports none of the modules that commands need, so `--help` and errors are fast.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from sequencerd import __version__
from sequencerd.cli import ids
from sequencerd.cli.ids import positive
from sequencerd.cli.streams import write
from sequencerd.core.brake import MAX_BRAKE, read_brake

TRY_AGAIN = 75  # EX_TEMPFAIL: a mail server keeps the message
MAX_NAMED = 10  # choices in an error
MAX_SECONDS = 10 * 365 * 86400

WITHOUT_SETTINGS = frozenset({"completion", "console-password", "install-service", "schema"})
"""Commands that work whatever is wrong with the settings, as some help to correct them."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; `run` in its result names the function of the command."""
    parser = _Parser(
        prog="sequencerd",
        description="Moves enrollments through sequences of steps, on PostgreSQL.",
    )
    parser.add_argument("--version", action=_Version)
    _add_settings(parser)
    commands = Commands(parser)
    _add_service(commands)
    _add_authoring(commands)
    _add_changes(commands)
    _add_preview(commands)
    _add_messages(commands)
    _add_operation(commands)
    _add_bounces(commands)
    _add_privacy(commands)
    _add_inspection(commands)
    _add_demo(commands)
    return parser


def _add_settings(parser: argparse.ArgumentParser, **default: Any) -> None:
    """Add the options that all commands have, and that may also stand before the command."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings in TOML (or SEQUENCERD_CONFIG)",
        **default,
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        help="postgresql://user@host/name (or SEQUENCERD_DATABASE)",
        **default,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a wrong argument, with control characters escaped."""
        from sequencerd.core.describe import visible  # noqa: PLC0415 - as below

        super().error(visible(message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Report what a command does not know with the usage of that command."""
        given, rest = super().parse_known_args(args, namespace)
        if rest:
            near = get_close_matches(rest[0].partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return given, rest

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Keep `--` as the value of an option, as in --subject=--, which argparse drops."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Suggest what may be meant by a choice that does not exist, instead of naming all."""
        choices = [str(choice) for choice in action.choices or ()]
        near = get_close_matches(str(value), choices, n=1)
        if near and near[0] != str(value):
            hint = f"invalid choice: {value!r}; did you mean {near[0]!r}?"
            raise argparse.ArgumentError(action, hint)
        if not near and len(choices) > MAX_NAMED:
            hint = f"invalid choice: {value!r}; see: {self.prog} --help"
            raise argparse.ArgumentError(action, hint)
        super()._check_value(action, value)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help; argparse would ignore that it cannot be written."""
        if file is sys.stdout:
            write(message)
        else:  # before 3.11.4, argparse raises that standard error cannot be written
            with suppress(OSError):
                super()._print_message(message, file)


class _Version(argparse.Action):
    """Prints the version with that of the schema; both are read only when needed."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from sequencerd.storage.migrations import available  # noqa: PLC0415 - see above

        schema = available()[-1].name.removesuffix(".sql")
        write(f"{__version__}, schema {schema}\n")
        parser.exit()


class Commands:
    """The commands of a parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        self, name: str, run: str, about: str, example: str, *, has_database: bool = True
    ) -> argparse.ArgumentParser:
        """Add a command and return its parser. `run` is "module.function" within this package."""
        command = self._parsers.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"Example: sequencerd {example}",
            conflict_handler="resolve",  # a command may use one of the names for something else
        )
        _add_settings(command, default=argparse.SUPPRESS)  # keep what stands before the command
        if has_database:
            command.add_argument(
                "--shard",
                action="extend",
                type=lambda text: text.split(","),
                metavar="NAME",
                help="only this shard of the settings, or several: a,b (default: all)",
            )
        command.set_defaults(run=run, shard=None)
        return command


def add_json(command: argparse.ArgumentParser) -> None:
    """Add --json, which every command with output for programs has."""
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_demo(commands: Commands) -> None:
    shown = commands.add(
        "demo",
        "demo.demo_command",
        "show sequencerd at work in twenty seconds, with a temporary database and servers",
        "demo",
        has_database=False,
    )
    shown.add_argument(
        "--psql",
        nargs=argparse.REMAINDER,
        metavar="ARGUMENT",
        help="open psql on the database of the last demo, with these arguments",
    )


def _add_service(commands: Commands) -> None:
    run = commands.add(
        "run", "run.run_command", "run the daemon until SIGTERM", "--config sequencerd.toml run"
    )
    run.add_argument("--check", action="store_true", help="only check the settings, and exit")
    console = commands.add(
        "console",
        "console.console_command",
        "run the console in the browser without a daemon, until SIGTERM",
        "--config sequencerd.toml console --listen 127.0.0.1:9188",
    )
    console.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="host and port (default: http.listen, or else 127.0.0.1:9187)",
    )
    commands.add("migrate", "service.migrate_command", "create or update the schema", "migrate")
    grants = commands.add(
        "grants",
        "service.grants_command",
        "print the SQL that grants the roles their missing privileges",
        "grants | sudo -u postgres psql app",
    )
    grants.add_argument("--apply", action="store_true", help="run it instead of printing it")
    commands.add(
        "fdw",
        "front.fdw_command",
        "print the SQL for one table over all shards, with postgres_fdw",
        "fdw | psql front",
    )
    commands.add(
        "console-password",
        "service.console_password_command",
        "ask for a password and print its hash, for console.password_hash",
        "console-password",
        has_database=False,
    )
    completion = commands.add(
        "completion",
        "completion.completion_command",
        "print the completion of commands and options for a shell",
        "completion bash | sudo tee /etc/bash_completion.d/sequencerd",
        has_database=False,
    )
    completion.add_argument("shell", choices=["bash", "zsh", "fish"], help="the shell")
    service = commands.add(
        "install-service",
        "service.install_service_command",
        "write the systemd units for this installation",
        "install-service --user app",
        has_database=False,
    )
    service.add_argument(
        "--user", metavar="USER", help="run as this user (default: a dynamic user)"
    )
    service.add_argument(
        "--to",
        type=Path,
        default=Path("/etc/systemd/system"),
        metavar="FOLDER",
        help="the folder for the units (default: %(default)s)",
    )
    service.add_argument(
        "--print", action="store_true", help="print the units instead of writing them"
    )


def _add_authoring(commands: Commands) -> None:
    check = commands.add(
        "check",
        "authoring.check_command",
        "validate files, without a database",
        "check *.yaml",
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML or JSON")
    check.add_argument(
        "--data",
        metavar="JSON",
        help="warn about paths that are not in this example of the data (default: the data of "
        "enrollments, if a database is configured)",
    )
    check.add_argument("--strict", action="store_true", help="treat warnings as errors")
    add_json(check)
    commands.add(
        "schema",
        "authoring.schema_command",
        "print the JSON Schema of sequence files, for editors",
        "schema > sequencer.schema.json",
        has_database=False,
    )


def _add_changes(commands: Commands) -> None:
    planned = commands.add(
        "plan", "changes.plan_command", "show what apply would change", "plan onboarding.yaml"
    )
    _add_files(planned)
    planned.add_argument(
        "--detailed-exitcode", action="store_true", help="exit with 2 if there are changes"
    )
    add_json(planned)

    applied = commands.add(
        "apply",
        "changes.apply_command",
        "create or update the sequences in files",
        "apply onboarding.yaml",
    )
    _add_files(applied)
    applied.add_argument(
        "--plan",
        metavar="PLAN",
        help="apply only if the plan still has this fingerprint, as printed by `plan`",
    )
    applied.add_argument(
        "--brake",
        type=_brake,
        metavar="N",
        help="for a day, pause each changed sequence instead of executing more than N side "
        "effects in an hour",
    )
    _add_reason(applied)
    add_json(applied)

    history = commands.add(
        "history",
        "changes.history_command",
        "show the revisions of a sequence",
        "history onboarding",
    )
    history.add_argument("sequence", help="name of the sequence")
    add_json(history)

    export = commands.add(
        "export",
        "changes.export_command",
        "print a sequence as a file for apply",
        "export onboarding --revision 3",
    )
    export.add_argument("sequence", help="name of the sequence")
    export.add_argument(
        "--revision", type=positive, metavar="N", help="this revision (default: the current one)"
    )

    holidays = commands.add(
        "holidays",
        "holidays.holidays_command",
        "add the public holidays of a country to a calendar",
        "holidays DE 2026 2027",
    )
    holidays.add_argument(
        "country", metavar="COUNTRY", help="a code such as DE, or DE-BY for a part of a country"
    )
    holidays.add_argument(
        "years", nargs="+", type=_year, metavar="YEAR", help="a year, such as 2026"
    )
    holidays.add_argument(
        "--calendar", metavar="NAME", help="the calendar to add to (default: the code)"
    )
    add_json(holidays)

    imported = commands.add(
        "import-original",
        "changes.import_command",
        "import sequences and enrollments from the tables of the original Sequencer",
        "import-original --database postgresql://localhost/old",
    )
    imported.add_argument(
        "--database",
        dest="original",
        metavar="URL",
        help="the database with those tables (default: the same database)",
    )
    imported.add_argument(
        "--schema", default="public", help="the schema of those tables (default: %(default)s)"
    )
    imported.add_argument(
        "--lookup", metavar="NAME", help="the lookup for sequences that use external data"
    )
    imported.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="SEQUENCE",
        help="only this sequence, by title or id; may be repeated",
    )
    imported.add_argument(
        "--conditional",
        choices=["wait", "branch"],
        metavar="HOW",
        help="what a Conditional does if it is false: wait, like the original's code, or branch to "
        "altNextStep, as in the original's README",
    )
    imported.add_argument(
        "--past-dates",
        choices=["send", "skip", "hold"],
        metavar="HOW",
        help="what enrollments at a WaitForDate do if its day is over: send (continue at once), "
        "skip (the next step), or hold (wait as in the original)",
    )
    imported.add_argument(
        "--apply", action="store_true", help="apply the import (default: a dry run)"
    )
    add_json(imported)


def _year(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 9999):
        raise argparse.ArgumentTypeError(f"{text!r} is not a year")
    return int(text)


def _brake(text: str) -> int:
    if (number := read_brake(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number from 1 to {MAX_BRAKE:,}")
    return number


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML or JSON")
    command.add_argument(
        "--move",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="move enrollments at a removed step to another step; may be repeated",
    )
    command.add_argument(
        "--prune",
        action="store_true",
        help="archive sequences that were applied from files and are in none of these",
    )


def _add_preview(commands: Commands) -> None:
    simulate = commands.add(
        "simulate",
        "preview.simulate_command",
        "show what would happen to an enrollment, for a year",
        """simulate onboarding.yaml --data '{"name": "Ada"}' --set 'P3D: {"paid": true}'""",
    )
    simulate.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="NAME|FILE",
        help="a sequence in the database, or a file",
    )
    simulate.add_argument("sequence", nargs="?", help="if the file has several")
    simulate.add_argument("--data", metavar="JSON", help="data of the enrollment")
    simulate.add_argument("--subject", help="for templates and Split (default: subject)")
    simulate.add_argument("--timezone", metavar="ZONE", help="time zone of the subject")
    simulate.add_argument(
        "--start",
        metavar="TIME",
        help="start time, ISO 8601, UTC unless it has an offset (default: now)",
    )
    simulate.add_argument("--until", metavar="TIME", help="end time (default: a year later)")
    simulate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="WHEN: JSON",
        help="merge data at a step, after a duration such as P3D, or at a time; may be repeated",
    )
    simulate.add_argument("--lookup", metavar="JSON", help="result of the lookup")
    simulate.add_argument(
        "--runner",
        action="append",
        default=[],
        metavar="TYPE=OUTCOME",
        help="result of side effects: next, altNext, noop, fail, or the runner's answer as JSON "
        "(default: next); may be repeated",
    )
    simulate.add_argument(
        "--from-enrollment",
        type=ids.parse,
        metavar="ID",
        help="continue from the state of this enrollment, read-only",
    )
    add_json(simulate)
    shown = commands.add(
        "graph",
        "preview.graph_command",
        "draw a sequence, with the number of enrollments at each step",
        "graph onboarding",
    )
    shown.add_argument("target", metavar="NAME|FILE", help="a sequence in the database, or a file")
    shown.add_argument("sequence", nargs="?", help="if the file has several")
    shown.add_argument(
        "--format",
        choices=["text", "mermaid", "dot"],
        default="text",
        help="the form of the drawing (default: %(default)s)",
    )


def _add_messages(commands: Commands) -> None:
    preview = commands.add(
        "preview",
        "messages.preview_command",
        "print the finished message of a step, without sending it",
        """preview onboarding.yaml welcome --data '{"name": "Ada"}' > welcome.eml""",
    )
    _add_message(preview)
    preview.add_argument(
        "--html", action="store_true", help="print a page for a browser instead of the message"
    )
    preview.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write to this file (default: stdout)"
    )
    test = commands.add(
        "send-test",
        "messages.send_test_command",
        "send the message of a step to one address, marked as a test",
        "send-test onboarding welcome --to me@example.com --enrollment 7",
    )
    _add_message(test)
    test.add_argument(
        "--to", required=True, metavar="ADDRESS", help="the only recipient: an address or a number"
    )


def _add_message(command: argparse.ArgumentParser) -> None:
    """Add the arguments that identify a message: a step, and its data."""
    command.add_argument(
        "target", metavar="NAME|FILE", help="a sequence in the database, or a file"
    )
    command.add_argument("sequence", nargs="?", help="if the file has several")
    command.add_argument("step", help="a step that sends a message")
    command.add_argument("--data", metavar="JSON", help="data of the enrollment")
    command.add_argument(
        "--enrollment",
        type=ids.parse,
        metavar="ID",
        help="use the data, subject and time zone of this enrollment, read-only",
    )
    command.add_argument("--subject", help="for templates (default: subject)")
    command.add_argument("--timezone", metavar="ZONE", help="time zone of the subject")
    command.add_argument("--lookup", metavar="JSON", help="result of the lookup")
    command.add_argument("--locale", metavar="LANGUAGE", help="language of the subject, such as de")


def _add_operation(commands: Commands) -> None:
    enroll = commands.add(
        "enroll",
        "operation.enroll_command",
        "enroll a subject in a sequence",
        """enroll onboarding user-42 --data '{"email": "ada@example.com"}'""",
    )
    enroll.add_argument("sequence", help="name of the sequence")
    enroll.add_argument("subject", help="what is enrolled, such as the id of a customer")
    enroll.add_argument("--data", default="{}", metavar="JSON", help="data of the enrollment")
    enroll.add_argument("--timezone", metavar="ZONE", help="time zone of the subject")
    enroll.add_argument("--step", help="start at this step (default: the first)")
    enroll.add_argument(
        "--at",
        metavar="TIME",
        help="start time, ISO 8601, UTC unless it has an offset (default: now)",
    )
    add_json(enroll)

    retry = _add_change(
        commands,
        "retry",
        "retry failed enrollments",
        "retry --sequence onboarding --failure error --reason 'the mail server is back'",
    )
    retry.add_argument(
        "--skip", action="store_true", help="continue at the next step instead of retrying this one"
    )
    _add_change(commands, "cancel", "end active and failed enrollments", "cancel --subject user-42")
    move = _add_change(
        commands,
        "move",
        "move active and failed enrollments to another step immediately",
        "move --sequence onboarding --step pause --to nudge",
    )
    move.add_argument("--to", required=True, metavar="STEP", help="a step of the same sequence")
    _add_change(
        commands,
        "reevaluate",
        "reevaluate waiting enrollments after external data has changed",
        "reevaluate --subject user-42",
    )
    for name, about, example in (
        (
            "pause",
            "pause sequences: nothing is executed, time continues to pass",
            "pause onboarding",
        ),
        ("resume", "resume paused and archived sequences", "resume onboarding"),
        (
            "archive",
            "archive sequences: no new enrollments; existing ones continue",
            "archive onboarding",
        ),
    ):
        command = commands.add(name, "operation.set_status_command", about, example)
        command.add_argument("sequences", nargs="+", metavar="SEQUENCE", help="name of a sequence")
        _add_reason(command)
        add_json(command)


def _add_change(commands: Commands, name: str, about: str, example: str) -> argparse.ArgumentParser:
    command = commands.add(name, "operation.change_command", about, example)
    command.add_argument(
        "ids", nargs="*", type=ids.parse, metavar="ID", help="id of an enrollment, or use filters"
    )
    _add_filters(command)
    command.set_defaults(failure=None)
    if name != "reevaluate":  # which applies to none that failed
        command.add_argument(
            "--failure",
            metavar="CODE",
            help="only enrollments with this failure code, such as error",
        )
    command.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    command.add_argument(
        "--dry-run", action="store_true", help="show the selected enrollments, change nothing"
    )
    _add_reason(command)
    add_json(command)
    return command


def _add_filters(command: argparse.ArgumentParser) -> None:
    command.add_argument("--subject", help="only enrollments of this subject")
    command.add_argument("--sequence", help="only enrollments in this sequence")
    command.add_argument("--step", help="only enrollments at this step")


def _add_reason(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reason", metavar="TEXT", help="reason, recorded in the history")


def _add_bounces(commands: Commands) -> None:
    bounce = commands.add(
        "bounce",
        "bounce.bounce_command",
        "read a bounce or an abuse report from standard input, and suppress its recipient",
        "bounce < message.eml",
    )
    bounce.set_defaults(exit_code_of_errors=TRY_AGAIN)


def _add_privacy(commands: Commands) -> None:
    forget = commands.add(
        "forget",
        "privacy.forget_command",
        "delete all data about a subject; its suppressed addresses remain as hashes",
        "forget user-42",
    )
    forget.add_argument("subject", help="the subject")
    forget.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    forget.add_argument(
        "--dry-run", action="store_true", help="show what would be deleted, change nothing"
    )
    add_json(forget)
    export = commands.add(
        "export-subject",
        "privacy.export_subject_command",
        "print all data about a subject, as JSON",
        "export-subject user-42 > user-42.json",
    )
    export.add_argument("subject", help="the subject")


def _add_inspection(commands: Commands) -> None:
    status = commands.add(
        "status",
        "inspection.status_command",
        "show the number of enrollments at each step",
        "status onboarding",
    )
    status.add_argument("sequence", nargs="?", help="only this sequence (default: all)")
    add_json(status)

    watch = commands.add(
        "watch",
        "inspection.watch_command",
        "show the status, refreshed continuously",
        "watch onboarding",
    )
    watch.add_argument("sequence", nargs="?", help="only this sequence (default: all)")
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="time between queries (default: %(default)g); at least as long as a query takes",
    )

    list_ = commands.add(
        "list",
        "inspection.list_command",
        "list enrollments",
        "list --sequence onboarding --status failed",
    )
    _add_filters(list_)
    list_.add_argument(
        "--status",
        choices=["active", "completed", "cancelled", "failed"],
        metavar="STATUS",
        help="only enrollments with this status: active, completed, cancelled or failed",
    )
    list_.add_argument(
        "--failure", metavar="CODE", help="only enrollments with this failure code, such as error"
    )
    list_.add_argument(
        "--overdue", action="store_true", help="only enrollments overdue by more than a minute"
    )
    list_.add_argument(
        "--after",
        type=ids.parse,
        default=ids.Id(None, 0),
        metavar="ID",
        help="continue after this id, for the next page",
    )
    list_.add_argument(
        "--limit",
        type=positive,
        default=100,
        metavar="N",
        help="at most this many enrollments (default: %(default)s)",
    )
    add_json(list_)

    show = commands.add(
        "show",
        "inspection.show_enrollment_command",
        "show the state and history of an enrollment",
        "show 7",
    )
    show.add_argument("id", type=ids.parse, metavar="ID", help="id of the enrollment")
    add_json(show)

    tail = commands.add(
        "tail",
        "inspection.tail_command",
        "print events as they happen",
        "tail --sequence onboarding",
    )
    tail.add_argument("--sequence", help="events in this sequence only")
    tail.add_argument("--id", type=ids.parse, metavar="ID", help="events of this enrollment only")
    tail.add_argument(
        "--since",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="also print the events of this many past seconds",
    )
    add_json(tail)

    examine = commands.add(
        "doctor",
        "doctor.doctor_command",
        "find problems in the database, the settings and the endpoints",
        "doctor",
    )
    add_json(examine)


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds")
    return seconds
