"""The image: built by podman, run read-only without rights, its health and its end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

import sequencerd
from tests.helpers.engines import ALL_ENDED, define, enroll, until
from tests.helpers.waiting import eventually
from tests.service.test_http_server import free_port
from tests.system.debian import REPOSITORY, wheels
from tests.system.podman import LIMITS, Podman, podman
from tests.test_container import needed

pytestmark = pytest.mark.system

ONCE = ("run", "--rm", "--no-healthcheck", *LIMITS)
RESTRICTED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    settings = tmp_path_factory.mktemp("pip") / "pip.conf"
    settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    with podman() as program:
        program(
            "build",
            "--format=docker",
            "--network=none",
            *LIMITS,
            "--tag=sequencerd",
            f"--volume={wheels('3.13')}:/wheels:ro",
            f"--volume={settings}:/etc/pip.conf:ro",
            REPOSITORY,
        )
        yield program


def options(url: str) -> Sequence[str]:
    """What lets a container reach the tests' server, through its socket if it has no address."""
    (folder,) = parse_qs(urlsplit(url).query).get("host", [""])
    if folder.startswith("/"):
        Path(folder).chmod(0o711)  # for another user than the server's
        return "--network=host", f"--volume={folder}:{folder}", f"--env=SEQUENCERD_DATABASE={url}"
    return "--network=host", f"--env=SEQUENCERD_DATABASE={url}"


@contextmanager
def running(image: Podman, url: str) -> Iterator[str]:
    """A daemon in a container with no rights. Return its name."""
    name = "daemon"
    listen = f"--env=SEQUENCERD_HTTP_LISTEN=127.0.0.1:{free_port()}"
    image(
        "run",
        "--detach",
        f"--name={name}",
        *LIMITS,
        *RESTRICTED,
        *options(url),
        listen,
        "sequencerd",
    )
    try:
        yield name
    finally:
        image("rm", "--force", "--time=0", name)


def test_the_image_has_only_what_runs(image: Podman) -> None:
    program = "from importlib.metadata import *; print(*(d.name for d in distributions()))"
    entry = ("--entrypoint=/opt/sequencerd/bin/python", "sequencerd", "-I", "-c", program)
    names = {name.lower().replace("_", "-") for name in image(*ONCE, *entry).split()}
    assert names == needed("uvloop") | {"sequencerd"}
    version = image(*ONCE, "sequencerd", "--version")
    assert version.startswith(f"{sequencerd.__version__}, schema ")


async def test_the_image_runs_read_only_as_a_user_and_ends_at_sigterm(
    image: Podman, database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("only", "GoTo", "{}", None))
    with running(image, database) as name:
        await eventually(lambda: image.try_to("healthcheck", "run", name).returncode == 0)
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
        ids = "import os; print(os.getuid(), os.getgid())"
        assert image("exec", name, "python", "-c", ids).split() == ["10001", "10001"]
        write = "open('/opt/sequencerd/x', 'w')"
        assert "Read-only file system" in image("exec", name, "python", "-c", write, code=1)
        image("stop", "--time=40", name)
        (found,) = json.loads(image("inspect", name))
        assert found["State"]["ExitCode"] == 0
        log = image("logs", name)
    assert "Traceback" not in log
    assert "SIGKILL" not in log


def test_wrong_settings_end_the_container_with_the_reason(image: Podman) -> None:
    wrong = "--env=SEQUENCERD_LOG_LEVEL=loud"
    output = image(*ONCE, *RESTRICTED, wrong, "sequencerd", code=2)
    assert "log.level" in output
    assert "Traceback" not in output


async def test_the_image_migrates(image: Podman, database: str) -> None:
    output = image(*ONCE, *RESTRICTED, *options(database), "sequencerd", "migrate")
    assert "up to date" in output
