"""`sequencerd demo`: a database, a mail server, an HTTP server and a daemon, for twenty seconds."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import asyncpg
import yaml

from sequencerd.core.describe import counted
from sequencerd.definitions import apply_plan, files, yaml_reader
from sequencerd.errors import SequencerdError
from sequencerd.runners import registry
from sequencerd.settings import Settings
from sequencerd.settings_file import load
from sequencerd.storage import connections, embedded, migrate
from sequencerd.storage.connections import Shard
from sequencerd.storage.schemas import in_schema, schema_of
from sequencerd.storage.statements import QUERIES

TIMEOUT = 300  # seconds after which the demo has failed, even on a busy machine
ENROLLMENTS = """\
INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES
  ('onboarding', 'ada',  '{"name": "Ada",  "email": "ada@example.com",  "phone": "+15005550010", "logins": 8}'),
  ('onboarding', 'bob',  '{"name": "Bob",  "email": "bob@example.com",  "phone": "+15005550011", "logins": 0}'),
  ('onboarding', 'cleo', '{"name": "Cleo", "email": "cleo@example.com", "phone": "+15005550012", "logins": 3}');"""  # noqa: E501
CLEO_PAYS = (
    "UPDATE sequencer.enrollments SET data = data || '{\"plan\": \"pro\"}' WHERE subject = 'cleo';"
)

_begun = time.monotonic()


def demo_command(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run the demo, or open psql on its database."""
    psql = arguments.psql
    folder = embedded.default_folder().with_name("demo")
    if psql is not None:
        with embedded.running(folder) as server:
            return subprocess.run([str(server.psql), server.url, *psql], check=False).returncode  # noqa: S603
    if folder.exists():
        shutil.rmtree(folder)
    _say("starting an embedded PostgreSQL")
    with (
        embedded.running(folder) as server,
        _http_server() as http,
        tempfile.TemporaryDirectory() as scratch,
    ):
        shard = Shard(server.url, settings.database.schema_name)
        asyncio.run(_show(shard, http, Path(scratch, "demo.toml")))
    print("\nTo continue with psql on the same database:\n")
    print(f"    {_program()} demo --psql")
    return 0


def _program() -> str:
    """Return how the user called this program."""
    installed = Path(sys.executable).with_name("sequencerd")
    if found := shutil.which("sequencerd"):
        return "sequencerd" if Path(found).samefile(installed) else str(installed)
    return str(installed) if installed.exists() else f"{sys.executable} -m sequencerd"


async def _show(shard: Shard, http: str, config: Path) -> None:
    async with connections.connected(shard) as connection:
        await migrate.migrate(connection)
        async with _mail_server() as smtp, _daemon(shard, smtp, http, config):
            await _apply(connection, load({}, config))
            print(f"\n{in_schema(ENROLLMENTS, shard.schema)}\n")
            await connection.execute(ENROLLMENTS)
            await _follow(connection)
        await _print_history(connection)


def _shortened() -> str:
    """Return the example, with its waits shortened to seconds."""
    text = (_examples() / "onboarding.yaml").read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    for step in document["steps"]:
        match step.get("config"):
            case {"amount": _, "unit": _}:
                step["config"] = {"amount": 6, "unit": "seconds"}
            case {"attribute": _, "values": _}:
                step["config"] = {"attribute": "second", "values": list(range(0, 60, 3))}
    return yaml.safe_dump(document, sort_keys=False)


async def _apply(connection: asyncpg.Connection, settings: Settings) -> None:
    runners = registry.make_runners(settings)
    documents = {"the example": yaml_reader.parse(_shortened())}
    found, _ = files.check_documents(documents, runners)
    async with connection.transaction():
        applied = await apply_plan.apply(connection, found, runners)
    for one in applied.sequences:
        count = len(one.changes.added)
        _say(f"applied {one.sequence}: {counted(count, 'step')}, waits shortened to seconds")


def _examples() -> Path:
    """Return the folder of examples: in the installed package, or beside it in a checkout."""
    packaged = Path(str(resources.files("sequencerd"))) / "examples"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "examples"


async def _follow(connection: asyncpg.Connection) -> None:
    """Print events as they happen, and let Cleo pay, until all enrollments have ended."""
    seen: set[tuple[int, Any, str]] = set()
    pays = float("inf")
    since = await connection.fetchval(QUERIES["server_time"])
    active = True
    async with asyncio.timeout(TIMEOUT):
        while active:
            active = await connection.fetchval(
                "SELECT EXISTS (SELECT FROM sequencer.enrollments WHERE status = 'active')"
            )
            for row in await connection.fetch(QUERIES["events_since"], since, None, None):
                key = (row["enrollment_id"], row["at"], row["action"])
                if key not in seen:
                    seen.add(key)
                    message = f": {row['message']}" if row["message"] else ""
                    _say(f"{row['subject']:5} {row['step']} {row['action']}{message}")
                    if (row["subject"], row["step"], row["action"]) == ("cleo", "welcome", "next"):
                        pays = time.monotonic() + 1  # Cleo's enrollment waits now
            if time.monotonic() > pays:
                pays = float("inf")
                print(f"\n{in_schema(CLEO_PAYS, schema_of(connection))}\n")
                await connection.execute(CLEO_PAYS)
            await asyncio.sleep(0.05)


async def _print_history(connection: asyncpg.Connection) -> None:
    for id_, subject, status in await connection.fetch(
        "SELECT id, subject, status FROM sequencer.enrollments ORDER BY id"
    ):
        history = in_schema("sequencer.events", schema_of(connection))
        print(
            f"\nSELECT * FROM {history} WHERE enrollment_id = {id_} ORDER BY visit, at;"
            f"  -- {subject}, {status}"
        )
        for row in await connection.fetch(QUERIES["history"], id_):
            at, message = f"{row['at']:%H:%M:%S}", row["message"] or ""
            print(f"  {at}  {row['step']:15} {row['action']:10} {message}".rstrip())


def _write_settings(schema: str, smtp: str, http: str, file: Path) -> None:
    file.write_text(
        f"""
        [database]
        schema = {json.dumps(schema, ensure_ascii=False)}
        [email]
        url = "{smtp}"
        [sms]
        account_sid = "ACdemo"
        auth_token = "demo"
        base_url = "{http}"
        [runners.Score]
        url = "{http}/score"
        [log]
        level = "warning"
        """,
        encoding="utf-8",
    )


@contextlib.asynccontextmanager
async def _daemon(shard: Shard, smtp: str, http: str, config: Path) -> AsyncIterator[None]:
    """Run the daemon as a separate process, as in production."""
    _write_settings(shard.schema, smtp, http, config)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sequencerd", "--config", str(config), "--database", shard.url, "run"
    )
    _say("started the daemon")
    try:
        yield
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        code = await process.wait()
    if code:
        raise SequencerdError(f"the daemon ended with exit status {code}")
    _say("the daemon has stopped")


@contextlib.asynccontextmanager
async def _mail_server() -> AsyncIterator[str]:
    """Run a real SMTP server that prints the messages."""
    try:
        from aiosmtpd.smtp import SMTP  # noqa: PLC0415 - comes with the extra
    except ImportError as error:
        raise SequencerdError("the demo needs: pip install 'sequencerd[embedded]'") from error

    class Printer:
        async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:
            message = message_from_bytes(envelope.content, policy=policy.default)
            _say(f"      mail to {', '.join(envelope.rcpt_tos)}: {message['subject']}")
            return "250 OK"

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(Printer(), enable_SMTPUTF8=True), "127.0.0.1", 0)
    try:
        yield f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    """Twilio's Messages resource, and a custom runner in the original's format."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/2010-04-01/Accounts/ACdemo/Messages.json":
            form = parse_qs(body.decode())
            _say(f"      SMS to {form['To'][0]}: {form['Body'][0]}")
            self._answer(201, {"sid": "SM0123456789abcdef", "status": "queued"})
        elif self.path == "/score":
            self._answer(200, [_score(runner) for runner in json.loads(body)["runners"]])
        else:
            self._answer(404, {"message": "not found"})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing: the timeline shows it."""


def _score(runner: Mapping[str, Any]) -> dict[str, object]:
    score = 10 * runner["data"]["logins"]
    message = f"scored {score}"
    return {"id": runner["id"], "action": "next", "message": message, "data": {"score": score}}


@contextlib.contextmanager
def _http_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _say(text: str) -> None:
    print(f"{time.monotonic() - _begun:5.1f} s  {text}", flush=True)
