"""Debian 12, with the oldest supported versions: Python 3.11, PostgreSQL 15, systemd 252."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.debian import Machine, booted, clone, tree, wheels

SYSTEM = (
    "systemd-sysv",
    "dbus",
    "libnss-systemd",
    "sudo",
    "make",
    "git",
    "python3-venv",
    "postgresql",
)

# what the reader has: an account that may use sudo, an application's database, a mail server
PREPARED = """
useradd --create-home --shell /bin/bash --groups systemd-journal ada
echo 'ada ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/ada
mkdir /home/ada/sequencerd-clone
tar --extract --directory=/home/ada/sequencerd-clone
chown --recursive ada: /home/ada
sed --in-place s/scram-sha-256/trust/ /etc/postgresql/*/main/pg_hba.conf
systemctl reload postgresql
su postgres --command 'psql --quiet --command="CREATE ROLE app LOGIN CREATEROLE" \
    --command="CREATE DATABASE app OWNER app"'
systemd-run --quiet --unit=mail python3 -u -W ignore -m smtpd -n -c DebuggingServer localhost:25
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    root = tree("bookworm", *SYSTEM)
    log = tmp_path_factory.mktemp("machine") / "boot.log"
    with booted(root, log, wheels=wheels("3.11")) as machine:
        machine.until("pg_isready", lambda output: "accepting" in output)
        machine(PREPARED, stdin=clone())
        yield machine
