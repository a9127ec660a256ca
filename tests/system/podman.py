"""Images and containers of podman, in a store of their own that ends with the test."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.debian import need, tree

BASE = "docker.io/library/python:3.13-slim"  # of the Dockerfile

# podman's own limits are higher than a machine may allow
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")


class Podman:
    def __init__(self, folder: Path, runtime: str) -> None:
        self._command = [
            "podman",
            "--root",
            str(folder / "root"),
            "--runroot",
            str(folder / "run"),
            "--storage-driver",
            "overlay",
            "--runtime",
            runtime,
            "--cgroup-manager",
            "cgroupfs",
        ]

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        """Run podman. Return what it prints, to either output."""
        done = self.try_to(*arguments)
        assert done.returncode == code, f"{arguments}\n{done.stdout}exit status {done.returncode}"
        return done.stdout

    def try_to(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


@contextmanager
def podman() -> Iterator[Podman]:
    """Podman with the base image: the registry's, or one that debootstrap makes."""
    need("podman")
    folder = Path(tempfile.mkdtemp(prefix="sequencerd-podman-", dir="/var/tmp"))
    tried: Podman | None = None
    try:
        reasons: list[str] = []
        for runtime in filter(shutil.which, ("crun", "runc")):
            tried = Podman(folder, runtime)
            if not reasons:
                _make_base(tried, folder)
            done = tried.try_to("run", "--rm", *LIMITS, "--network=host", BASE, "true")
            if done.returncode == 0:
                yield tried
                return
            reasons.append(done.stdout.strip())
        pytest.skip(f"podman runs no container here: {'; '.join(reasons) or 'no runtime'}")
    finally:
        if tried:  # it unmounts what is in the folder, also after a runtime that runs nothing
            tried.try_to("rm", "--all", "--force", "--time=0")
            tried.try_to("rmi", "--all", "--force")
        shutil.rmtree(folder)


def _make_base(podman: Podman, folder: Path) -> None:
    if podman.try_to("pull", "--quiet", BASE).returncode != 0:
        root = tree("trixie", "python3-pip", "python3-venv", "python-is-python3", "ca-certificates")
        archive = folder / "base.tar"
        subprocess.run(
            [
                "tar",
                "--create",
                "--file",
                archive,
                "--directory",
                root,
                "--exclude=./var/cache/apt",
                "--exclude=./var/lib/apt/lists",
                "--exclude=./dev",
                ".",
            ],
            check=True,
        )
        podman("import", "--quiet", archive, BASE)
        archive.unlink()
