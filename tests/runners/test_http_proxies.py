"""HTTP runners through the proxy that the environment names."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sequencerd.core.task import Answer, Result
from tests.helpers.runners import failed, http_runner
from tests.helpers.servers import HOST, all_next, certificate, http_server, serving, task

HIDDEN = "user:hidden@"


@dataclass
class Proxy:
    """A proxy: connects to one server, whatever host is named, or refuses with `status`."""

    server: int
    status: str = "200 OK"
    asked: list[str] = field(default_factory=list)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        first = head.decode().partition("\r\n")[0]
        self.asked.append(first.removesuffix(" HTTP/1.1"))
        server_reader, server = await asyncio.open_connection(HOST, self.server)
        try:
            if not first.startswith("CONNECT"):
                server.write(head)
            else:
                writer.write(f"HTTP/1.1 {self.status}\r\n\r\n".encode())
            if self.status == "200 OK":
                await asyncio.gather(_copy(reader, server), _copy(server_reader, writer))
        finally:
            server.close()
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def proxy(server: int, status: str = "200 OK") -> AsyncIterator[Proxy]:
    """A proxy on a port of its own."""
    made = Proxy(server, status)
    async with serving(made.serve) as made.port:
        yield made


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's context, trusted by clients."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    context, file = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    return context


def resolve(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """Let api.example.test have this address, or none that is known here."""
    loop = asyncio.get_running_loop()
    original = loop.getaddrinfo

    async def found(host: str | bytes, port: int, **options: Any) -> Any:
        if host not in ("api.example.test", b"api.example.test"):
            return await original(host, port, **options)
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(loop, "getaddrinfo", found)


async def call(url: str, **options: Any) -> Result:
    """The result of one call."""
    made = http_runner(url, **{"timeout": 60, "http2": False} | options)
    (result,) = await made.run(made.compile({}), [task()])
    await made.close()
    return result


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("address", ["8.8.8.8", None])
async def test_a_proxy_gets_the_name_of_the_host(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, address: str | None, http2: bool
) -> None:
    resolve(monkeypatch, address)
    async with http_server(all_next, tls) as server, proxy(server.port) as made:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{HIDDEN}{HOST}:{made.port}")
        assert await call("https://api.example.test/crm", http2=http2) == Answer()
    assert made.asked == ["CONNECT api.example.test:443"]


async def test_a_proxy_without_tls(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "8.8.8.8")
    async with http_server(all_next) as server, proxy(server.port) as made:
        monkeypatch.setenv("all_proxy", f"{HOST}:{made.port}")
        assert await call("http://api.example.test/crm") == Answer()
    assert made.asked == ["POST http://api.example.test/crm"]


async def test_a_private_address_is_refused_through_a_proxy_as_well(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, "10.0.0.1")
    async with http_server(all_next, tls) as server, proxy(server.port) as made:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{HOST}:{made.port}")
        refused = await call("https://api.example.test")
        allowed = await call("https://api.example.test", allow_private=True)
    assert "has the private address 10.0.0.1" in failed(refused).message
    assert allowed == Answer()


@pytest.mark.parametrize("exception", ["api.example.test", ".example.test", "*"])
async def test_hosts_without_a_proxy(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, exception: str
) -> None:
    resolve(monkeypatch, HOST)
    async with http_server(all_next, tls) as server, proxy(server.port) as made:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{HOST}:{made.port}")
        monkeypatch.setenv("NO_PROXY", exception)
        url = f"https://api.example.test:{server.port}"
        assert await call(url, allow_private=True) == Answer()
    assert made.asked == []


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        ("407 Proxy Authentication Required", "refused"),
        ("403 Forbidden", "refused"),
        ("503 Service Unavailable", "unreachable"),
    ],
)
async def test_a_proxy_that_does_not_connect(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, status: str, cause: str
) -> None:
    resolve(monkeypatch, "8.8.8.8")
    async with http_server(all_next, tls) as server, proxy(server.port, status) as made:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{HIDDEN}{HOST}:{made.port}")
        bad = failed(await call("https://api.example.test"))
    assert (bad.fault, bad.cause, bad.unknown) == ("server", cause, False)  # nothing was sent
    through = f"api.example.test:443 through the proxy {HOST}:{made.port}"
    assert bad.message == f"Crm: {through}: {status}"


async def test_a_certificate_that_is_not_accepted_behind_a_proxy(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with http_server(all_next, tls) as server, proxy(server.port) as made:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{HOST}:{made.port}")
        bad = failed(await call("https://127.0.0.2:8443"))
    assert (bad.fault, bad.cause, bad.unknown) == ("server", "refused", False)


@pytest.mark.parametrize("named", ["socks5://127.0.0.1:1080", "ftp://x", "http://", "http://[::1"])
async def test_a_proxy_that_cannot_be_used(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", named)
    bad = failed(await call("https://api.example.test", allow_private=True))
    assert (bad.fault, bad.cause, bad.unknown) == ("server", "refused", False)
    assert "https_proxy" in bad.message
