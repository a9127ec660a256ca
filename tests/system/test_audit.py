"""`make audit`, with a list of vulnerabilities and without one."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.service.test_http_server import free_port
from tests.system.debian import REPOSITORY

pytestmark = pytest.mark.system


class Osv(BaseHTTPRequestHandler):
    """Knows of one vulnerability, in jinja2."""

    def do_POST(self) -> None:
        package = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]
        events = [{"introduced": "0"}, {"fixed": "99.0"}]
        known = {
            "id": "GHSA-test",
            "summary": "a hole",
            "published": "2026-01-01T00:00:00Z",
            "affected": [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}]}],
        }
        body = json.dumps({"vulns": [known]} if package["name"] == "jinja2" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def osv() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", "audit", f"OSV_URL={url}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_known_vulnerability_fails(osv: str) -> None:
    done = audit(osv)
    assert done.returncode != 0
    assert "GHSA-test, fixed in 99.0" in done.stdout
    assert "packages compared" in done.stdout


def test_an_unreachable_list_of_vulnerabilities_is_reported() -> None:
    done = audit(f"http://127.0.0.1:{free_port()}/v1/query")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was compared" in done.stderr
