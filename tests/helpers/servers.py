"""Real servers in the test's own loop, on ports of their own."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import resource
import socket
import ssl
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset

from sequencerd.core.task import Task

HOST = "127.0.0.1"
REFUSED_STREAM = b"REFUSED_STREAM"
"""As a raw answer over HTTP/2: the request was not begun, as servers say that are overloaded."""

GOAWAY = b"GOAWAY"
"""As a raw answer over HTTP/2: the connection is given up, as servers do that are restarted."""

DIGEST = "5f2c" * 8
KEY = f"7:1:{DIGEST}"

PIPELINING = True
"""Whether SMTP servers take several commands at once."""


def task(id_: int = 7, **data: Any) -> Task:
    """A task as the engine makes it."""
    view = {
        "id": id_,
        "subject": f"user-{id_}",
        "data": data,
        "startSequence": "2026-01-02T03:04:05.678Z",
    }
    return Task(f"{id_}:1:{DIGEST}", view)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Meanwhile this process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def not_accepting(host: str, port: int) -> Iterator[None]:
    """Meanwhile connections to this address get no answer: the queue of its listener is full."""
    with socket.socket() as dead, socket.socket() as first, socket.socket() as second:
        dead.bind((host, port))
        dead.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex((host, port))
        yield


# --- SMTP


@dataclass
class Mailbox:
    """An SMTP server's handler: keeps messages, and answers as the test has set.

    `answers` are used up one by one, by command ("MAIL", "RCPT", "DATA"); with "drop" the
    connection is cut instead.
    """

    messages: list[Any] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # by recipient
    connections: int = 0
    open: set[Any] = field(default_factory=set)
    pipelining: bool = True
    hang: bool = False  # keep the client waiting for the answer to DATA
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    alone: asyncio.Event = field(default_factory=asyncio.Event)  # all connections have ended
    port: int = 0

    def _next(self, command: str, server: Any, usual: str) -> str:
        answer = self.answers[command].pop(0) if self.answers.get(command) else usual
        if answer == "drop":
            server.transport.abort()
        return answer

    async def handle_EHLO(  # noqa: N802 - aiosmtpd looks for this name
        self, server: Any, session: Any, envelope: Any, hostname: str, answers: list[str]
    ) -> list[str]:
        session.host_name = hostname
        return [*answers[:-1], *["250-PIPELINING"] * self.pipelining, answers[-1]]

    async def handle_MAIL(  # noqa: N802 - aiosmtpd looks for this name
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        answer = self._next("MAIL", server, "250 OK")
        if not answer.startswith("250"):
            envelope.mail_from = None
        return answer

    async def handle_RCPT(  # noqa: N802 - aiosmtpd looks for this name
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        answer = self.refused.get(address) or self._next("RCPT", server, "250 OK")
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(  # noqa: N802 - aiosmtpd looks for this name
        self, server: Any, session: Any, envelope: Any
    ) -> str:
        if self.hang:
            self.hanging.set()
            await asyncio.Event().wait()
        answer = self._next("DATA", server, f"250 2.0.0 queued as {len(self.messages) + 1}")
        if answer.startswith("250"):
            self.messages.append(envelope)
        return answer

    def parsed(self, index: int = 0) -> EmailMessage:
        """A message as the standard library reads it."""
        found = message_from_bytes(self.messages[index].content, policy=policy.default)
        assert isinstance(found, EmailMessage)
        assert not found.defects
        return found

    def cut(self) -> None:
        """Closes all connections, as a server does that restarts."""
        for server in list(self.open):
            server.transport.close()


class _Server(SMTP):
    def connection_made(self, transport: Any) -> None:
        handler = self.event_handler
        handler.connections += 1
        handler.open.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Any) -> None:
        self.event_handler.open.discard(self)
        if not self.event_handler.open:
            self.event_handler.alone.set()
        super().connection_lost(error)


@asynccontextmanager
async def smtp_server(
    *,
    tls: ssl.SSLContext | None = None,
    starttls: ssl.SSLContext | None = None,
    password: str | None = None,
    utf8: bool = True,
    port: int = 0,
) -> AsyncIterator[Mailbox]:
    """An SMTP server; with a password it wants the login `ada`."""
    handler = Mailbox(pipelining=PIPELINING)

    def check(_: Any, __: Any, ___: Any, ____: str, given: LoginPassword) -> AuthResult:
        right = given.login == b"ada" and given.password == (password or "").encode()
        return AuthResult(success=right, handled=False)

    def make() -> _Server:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of a login without TLS, as this one may be
            return start()

    def start() -> _Server:
        return _Server(
            handler,
            hostname="mail.example",
            enable_SMTPUTF8=utf8,
            tls_context=starttls,
            require_starttls=starttls is not None,
            authenticator=check if password else None,
            auth_required=password is not None,
            auth_require_tls=False,
            auth_exclude_mechanism=None if password else ["LOGIN", "PLAIN"],
        )

    server = await asyncio.get_running_loop().create_server(make, HOST, port, ssl=tls)
    handler.port = server.sockets[0].getsockname()[1]
    try:
        yield handler
    finally:
        handler.cut()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)


@dataclass
class Script:
    """An SMTP server that sends exactly the replies that the test has set.

    `answers` are used up one by one, by the first word of a command ("CONNECT" for the greeting,
    "." for the message): a text is sent with a line end, bytes as they are, None hangs up. After
    them it says yes. `slow` names a command whose next answer comes only after so many seconds.
    """

    answers: dict[str, list[str | bytes | None]] = field(default_factory=dict)
    extensions: list[str] = field(default_factory=lambda: ["PIPELINING", "SIZE 1000000"])
    slow: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    messages: list[tuple[list[str], bytes]] = field(default_factory=list)  # recipients, content
    connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        """Where it is, without encryption."""
        return f"smtp://{HOST}:{self.port}?starttls=never"

    async def _say(self, writer: asyncio.StreamWriter, verb: str, usual: str) -> str:
        """Answers, and tells what; empty where it hangs up."""
        answer: str | bytes | None = usual
        if self.answers.get(verb):
            answer = self.answers[verb].pop(0)
        if verb in self.slow:
            await asyncio.sleep(self.slow.pop(verb))
        if answer is None:
            return ""
        raw = answer if isinstance(answer, bytes) else answer.encode() + b"\r\n"
        writer.write(raw)
        await writer.drain()
        return raw.decode("latin-1").strip() or "?"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        recipients: list[str] = []
        hello = "\r\n".join([*(f"250-{word}" for word in ["here", *self.extensions]), "250 HELP"])
        usual = {
            "CONNECT": "220 here",
            "EHLO": hello,
            "DATA": "354 go on",
            "QUIT": "221 bye",
            "AUTH": "235 yes",
            "STARTTLS": "220 go on",
        }
        try:
            said = await self._say(writer, "CONNECT", usual["CONNECT"])
            while said and (raw := await reader.readline()):
                line = raw.decode().rstrip("\r\n")
                verb = line.partition(" ")[0].upper()
                self.commands.append(line)
                said = await self._say(writer, verb, usual.get(verb, "250 ok"))
                if verb == "MAIL":
                    recipients = []
                elif verb == "RCPT" and said.startswith("250"):
                    recipients.append(line.removeprefix("RCPT TO:").strip("<>"))
                elif verb == "DATA" and said.startswith("354"):
                    content = await reader.readuntil(b"\r\n.\r\n")
                    said = await self._say(writer, ".", f"250 queued as {len(self.messages) + 1}")
                    if said.startswith("250"):
                        self.messages.append((recipients, content))
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def scripted(**options: Any) -> AsyncIterator[Script]:
    """An SMTP server that follows a script."""
    script = Script(**options)
    async with serving(script.serve) as script.port:
        yield script


@asynccontextmanager
async def serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Serve connections on a port of its own; those that are open end with the context."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        with suppress(asyncio.CancelledError, ConnectionError):  # the test is over
            await serve(reader, writer)

    server = await asyncio.start_server(connected, HOST, 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for 127.0.0.1, localhost and api.example.test, and the file that lets
    one trust it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [
        x509.DNSName("localhost"),
        x509.DNSName("api.example.test"),
        x509.IPAddress(ipaddress.ip_address(HOST)),
    ]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, secret = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, secret)
    return context, cert


@contextmanager
def demanding_certificates(context: ssl.SSLContext) -> Iterator[int]:
    """A server that refuses clients without a certificate with an alert, which asyncio's does not
    send, and then waits until they close the connection.
    """
    context.verify_mode = ssl.CERT_REQUIRED

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    tls = context.wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    )
                    with tls:
                        with suppress(ssl.SSLError):
                            tls.do_handshake()
                        raw = socket.socket(fileno=tls.detach())
                    with raw, suppress(OSError):
                        while raw.recv(65536):
                            pass

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # which ends accept
            thread.join()


# --- HTTP


@dataclass(frozen=True)
class Request:
    """What an HTTP server has received."""

    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    method: str = "POST"


@dataclass
class Answer:
    """What it answers; `raw` bytes are sent as they are, and the connection is closed."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None


Respond = Callable[[Request], Awaitable[Answer]]


@dataclass
class HttpServer:
    """An HTTP server: keeps what arrives, answers as `respond` says."""

    respond: Respond
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{HOST}:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                pairs = (line.split(": ", 1) for line in head[1:] if line)
                headers: dict[str, str] = {}
                for name, value in pairs:
                    before = headers.get(name.lower())
                    headers[name.lower()] = value if before is None else f"{before}, {value}"
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, target, _ = head[0].split(" ")
                request = Request(target, headers, body, method)
                self.requests.append(request)
                answer = await self.respond(request)
                if answer.raw is not None:
                    writer.write(answer.raw)
                    await writer.drain()
                    return
                lines = [f"HTTP/1.1 {answer.status} X", f"Content-Length: {len(answer.body)}"]
                lines += [f"{name}: {value}" for name, value in answer.headers.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + answer.body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client is done
        finally:
            writer.close()


class Http2Server(HttpServer):
    """The same, speaking HTTP/2 over TLS. With `raw` it cuts the connection."""

    @property
    def url(self) -> str:
        """Its address."""
        return f"https://localhost:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, with many requests at a time."""
        self.connections += 1
        talk = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        talk.initiate_connection()
        received: dict[int, tuple[dict[str, str], bytearray]] = {}
        unsent: dict[int, bytes] = {}
        answering: set[asyncio.Task[None]] = set()

        def flush() -> None:
            for stream, body in list(unsent.items()):
                rest = body
                while (room := talk.local_flow_control_window(stream)) > 0 or not rest:
                    size = min(room, talk.max_outbound_frame_size)
                    talk.send_data(stream, rest[:size], end_stream=len(rest) <= size)
                    rest = rest[size:]
                    if not rest:
                        del unsent[stream]
                        break
                else:
                    unsent[stream] = rest
            writer.write(talk.data_to_send())

        async def answer(stream: int, request: Request) -> None:
            self.requests.append(request)
            given = await self.respond(request)
            if given.raw == GOAWAY:
                talk.close_connection(last_stream_id=stream)
                flush()
                return
            if given.raw == REFUSED_STREAM:
                talk.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
                flush()
                return
            if given.raw is not None:
                writer.transport.abort()
                return
            headers = {":status": str(given.status), **given.headers}
            talk.send_headers(stream, list(headers.items()))
            unsent[stream] = given.body
            flush()

        try:
            while data := await reader.read(65536):
                for event in talk.receive_data(data):
                    match event:
                        case RequestReceived():
                            pairs = ((str(n), str(v)) for n, v in event.headers)
                            received[event.stream_id] = dict(pairs), bytearray()
                        case DataReceived():
                            received[event.stream_id][1].extend(event.data)
                            size = event.flow_controlled_length
                            talk.acknowledge_received_data(size, event.stream_id)
                        case StreamEnded():
                            headers, body = received.pop(event.stream_id)
                            request = Request(headers[":path"], headers, bytes(body))
                            task = asyncio.create_task(answer(event.stream_id, request))
                            answering.add(task)
                            task.add_done_callback(answering.discard)
                        case StreamReset():
                            unsent.pop(event.stream_id, None)
                flush()
        except ConnectionError:
            return  # the client is done
        finally:
            for task in answering:
                task.cancel()
            writer.close()


async def all_next(request: Request) -> Answer:
    """Answers `next` for every enrollment that a custom runner gets."""
    ids = [view["id"] for view in json.loads(request.body)["runners"]]
    return Answer(body=json.dumps([{"id": id_, "action": "next"} for id_ in ids]).encode())


@asynccontextmanager
async def http_server(
    respond: Respond, tls: ssl.SSLContext | None = None
) -> AsyncIterator[HttpServer]:
    """An HTTP server; over TLS it offers HTTP/2 as well."""
    made = HttpServer(respond) if tls is None else Http2Server(respond)
    if tls is not None:
        tls.set_alpn_protocols(["h2", "http/1.1"])
    plain = partial(HttpServer.serve, made)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chosen = tls and writer.get_extra_info("ssl_object").selected_alpn_protocol()
        await (made.serve if chosen == "h2" else plain)(reader, writer)

    async with serving(serve, tls) as made.port:
        yield made
