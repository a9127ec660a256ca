"""The image and compose.yaml, without an engine: what they run is run here."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import asyncpg
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sequencerd
from sequencerd import settings, settings_file
from sequencerd.cli.arguments import make_parser
from sequencerd.storage import migrate
from tests.cli.test_doctor import examine
from tests.helpers.databases import execute, with_database, with_login
from tests.service.test_http_server import answers, daemon, is_ok

REPOSITORY = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with its text in one line."""
    text = re.sub(r"\\\n\s*", " ", (REPOSITORY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def one(instruction: str) -> str:
    """The text of an instruction of the image itself, the last stage."""
    return [text for word, text in instructions() if word == instruction][-1]


@cache
def needed(*extras: str) -> set[str]:
    """The distributions that sequencerd needs, theirs included, by canonical name."""
    found: set[str] = set()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"]
    for extra in extras:
        texts = texts + project["optional-dependencies"][extra]
    wanted: list[tuple[list[str], tuple[str, ...]]] = [(texts, ())]
    while wanted:
        texts, of_extras = wanted.pop()
        for requirement in map(Requirement, texts):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *of_extras)):
                other = canonicalize_name(requirement.name)
                if other not in found:
                    found.add(other)
                    more = distribution(other).requires or []
                    wanted.append((more, tuple(requirement.extras)))
    return found


def test_the_steps_install_what_the_image_runs(tmp_path: Path) -> None:
    build = tmp_path / "build"
    build.mkdir()
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": sysconfig.get_path("purelib"),  # for what the network would bring
        "PIP_NO_COMPILE": "0",  # pip's way to say: compile nothing
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # and: build with what is installed
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    for word, text in instructions():
        if word == "COPY" and not text.startswith("--from"):
            *sources, target = text.split()
            for source in sources:
                copy(source, build / target)
        elif word == "RUN" and text.startswith("pip download"):
            (build / "wheels").mkdir()  # it takes the network; what it gets is looked at below
        elif word == "RUN":
            line = text.replace("/opt/", f"{tmp_path}/opt/")
            done = subprocess.run(
                ["sh", "-euc", line],
                cwd=build,
                env=variables,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    home = tmp_path / "opt/sequencerd"
    shown = subprocess.run(
        [home / "bin/sequencerd", "install-service", "--print"],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"ExecStart={home}/bin/sequencerd run" in shown
    (site,) = home.glob("lib/*/site-packages")
    assert (site / "sequencerd/sql/0001_sequencer.sql").exists()
    assert (site / "sequencerd/examples/onboarding.yaml").exists()


def copy(source: str, target: Path) -> None:
    """As the builder does: what .dockerignore leaves out is not there."""
    allowed = (REPOSITORY / ".dockerignore").read_text().split()
    assert f"!{source}" in allowed, f"{source} is not sent to the builder"
    if (REPOSITORY / source).is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / source, target, ignore=ignored)
    else:
        shutil.copy(REPOSITORY / source, target)


def test_the_lock_holds_what_the_image_needs() -> None:
    (install,) = [text for word, text in instructions() if "--find-links wheels" in text]
    extras = re.findall(r"\.\[(\w+)\]", install)
    locked = re.findall(
        r"^(\S+)==\S+(?: ;.*)? \\\n\s+--hash=",
        (REPOSITORY / "requirements.txt").read_text(),
        re.MULTILINE,
    )
    assert needed(*extras) <= set(locked), needed(*extras) - set(locked)


def test_the_daemon_imports_what_is_installed_with_it() -> None:
    """Nothing of the packages for development, and of those of an extra only by its feature."""
    packages = packages_distributions()
    for file in sorted((REPOSITORY / "sequencerd").rglob("*.py")):
        extras = {
            "demo": "embedded",
            "embedded": "embedded",
            "tracing": "otel",
            "aws_lambda": "aws",
            "oidc": "oidc",
        }
        allowed = needed(extras.get(file.stem, "uvloop"))
        for node in ast.walk(ast.parse(file.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - {"sequencerd"}:
                if name not in sys.stdlib_module_names:
                    found = {canonicalize_name(package) for package in packages[name]}
                    assert found & allowed, f"{file} imports {name}"


def test_the_image_runs_without_privileges_and_without_a_shell() -> None:
    user = one("USER").partition(":")[0]
    assert int(user) > 0
    for text in (one("ENTRYPOINT"), one("CMD"), one("HEALTHCHECK").partition(" CMD ")[2]):
        assert isinstance(json.loads(text), list)  # the exec form: signals reach the daemon
    assert [*json.loads(one("ENTRYPOINT")), *json.loads(one("CMD"))] == ["sequencerd", "run"]


async def test_the_health_check_follows_the_daemon(database: str) -> None:
    """Whatever proxy Docker's own settings have, which it passes to containers."""
    in_compose = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]["sequencerd"]
    of_image = json.loads(one("HEALTHCHECK").partition(" CMD ")[2])
    of_compose = in_compose["healthcheck"]["test"][1:]
    assert (of_image[:2], of_compose[:2]) == (["python", "-c"], ["python", "-c"])

    async def check(address: str, program: str) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            env={
                **{name: value for name, value in os.environ.items() if name != "no_proxy"},
                "http_proxy": "http://127.0.0.1:1",
                "SEQUENCERD_HTTP_LISTEN": address,
            },
            stderr=subprocess.DEVNULL,
        )
        return await process.wait()

    async with daemon(database) as client:
        await answers(client, "/healthz", is_ok)
        port = str(client.base_url.port)
        for address in (f"{client.base_url.host}:{port}", f"0.0.0.0:{port}", port):
            assert await check(address, of_image[2]) == 0, address
        assert await check(port, of_compose[2].replace("9187", port)) == 0
    assert await check(port, of_image[2]) != 0
    assert await check(port, of_compose[2].replace("9187", port)) != 0


def test_compose_runs_commands_and_sets_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEQUENCERD_CONFIG", raising=False)
    services = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
    for name in ("migrate", "sequencerd"):
        service = services[name]
        assert make_parser().parse_args(service["command"])
        read = settings_file.load(service["environment"])
        assert read.database.url is not None
        assert "@database/" in read.database.url.get_secret_value()
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert set(service["depends_on"]) <= set(services)
    assert services["sequencerd"]["environment"]["SEQUENCERD_DATABASE"].startswith(
        "postgresql://sequencerd:"
    )  # not the owner, and no superuser
    grace = int(services["sequencerd"]["stop_grace_period"].removesuffix("s"))
    assert grace > settings.EngineSettings().stop_timeout


@pytest.mark.usefixtures("template")  # which makes the roles
async def test_the_logins_of_compose_suffice(server: str) -> None:
    """The owner migrates and the daemon's login has its privileges, without a superuser."""
    text = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["configs"]["logins"]["content"]
    names = ("app", "sequencerd")
    for statement in text.split(";\n"):
        if statement.strip() and "ROLE sequencer_" not in statement.partition(" IN ")[0]:
            own = re.sub(rf"\b({'|'.join(names)})\b", r"compose_\1", statement)
            await execute(server, own)
    try:
        owner = await asyncpg.connect(
            with_login(with_database(server, "compose_app"), "compose_app")
        )
        await migrate.migrate(owner)
        assert await migrate.grant(owner) == []
        # all roles exist on the server of a test; on a new one, the owner may not create them
        rows = await owner.fetch(
            "SELECT DISTINCT grantee::regrole::text"
            " FROM pg_class, aclexplode(relacl) WHERE relnamespace = 'sequencer'::regnamespace"
        )
        assert {row[0] for row in rows} - {"compose_app"} == {
            *re.findall(r"^CREATE ROLE (sequencer_\w+)", text, flags=re.MULTILINE)
        }
        await owner.close()
        found = await examine(
            with_login(with_database(server, "compose_app"), "compose_sequencerd")
        )
        assert found["roles"].seen == "this user has the privileges of a daemon"
    finally:
        await execute(server, "DROP DATABASE IF EXISTS compose_app WITH (FORCE)")
        for name in names:
            await execute(server, f"DROP ROLE IF EXISTS compose_{name}")


def test_the_manifest_for_kubernetes_runs_the_daemon(tmp_path: Path) -> None:
    manifest = (REPOSITORY / "packaging/kubernetes.yaml").read_text()
    deployment, budget = yaml.safe_load_all(manifest)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert make_parser().parse_args(container["args"])
    variables = {one["name"]: one["value"] for one in container["env"]}
    mount = container["volumeMounts"][0]["mountPath"]
    assert variables["SEQUENCERD_DATABASE_URL_FILE"] == f"{mount}/database"
    (tmp_path / "database").write_text("postgresql://sequencerd@db/app")
    variables["SEQUENCERD_DATABASE_URL_FILE"] = str(tmp_path / "database")
    read = settings_file.load(variables)
    assert (
        str(container["ports"][0]["containerPort"]) == (read.http.listen or "").rpartition(":")[2]
    )
    assert pod["terminationGracePeriodSeconds"] > settings.EngineSettings().stop_timeout
    assert str(pod["securityContext"]["runAsUser"]) == one("USER").partition(":")[0]
    assert container["image"].endswith(f":{sequencerd.__version__}")


def test_the_chart_has_the_version_of_the_program() -> None:
    chart = yaml.safe_load((REPOSITORY / "packaging/helm/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == sequencerd.__version__
