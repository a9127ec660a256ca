"""What all tests of a process share, as it takes long and never changes."""

from __future__ import annotations

import functools
import gc
import os
import ssl
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import certifi

from sequencerd import cli, passwords
from sequencerd.engine import lookups
from sequencerd.runners import python


def read_entry_points_once() -> None:
    """Read what the packages in a folder offer once: each engine asks for it."""

    @functools.cache
    def read(path: str) -> list[metadata.EntryPoint]:
        return [one for found in metadata.distributions(path=[path]) for one in found.entry_points]

    def entry_points(*, group: str) -> list[metadata.EntryPoint]:
        return [one for path in sys.path for one in read(path) if one.group == group]

    for module in (lookups, python):
        vars(module)["entry_points"] = entry_points


def make_parser_once() -> None:
    """Let a command use the parser of the one before it: to make it takes 13 ms."""
    cli.make_parser = functools.cache(cli.make_parser)  # type: ignore[attr-defined]


def trust_one_authority() -> None:
    """Let clients that trust the usual authorities trust one of them: reading 140 takes 25 ms.

    Which authorities this machine trusts beside them is no matter of tests.
    """
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        os.environ.pop(name, None)
    create, bundle = ssl.create_default_context, certifi.where()
    end = "-----END CERTIFICATE-----\n"
    one = Path(bundle).read_text().partition(end)[0] + end

    def cheap(
        purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH,
        *,
        cafile: Any = None,
        capath: Any = None,
        cadata: Any = None,
    ) -> ssl.SSLContext:
        is_usual = cafile in (None, bundle) and not capath and not cadata
        if is_usual and "SSL_CERT_FILE" not in os.environ:
            cafile, cadata = None, one
        return create(purpose, cafile=cafile, capath=capath, cadata=cadata)

    ssl.create_default_context = cheap


def hash_passwords_once() -> None:
    """Let the second login with a password take no tenth of a second."""
    passwords._scrypt = functools.cache(passwords._scrypt)


def collect_garbage_rarely() -> None:
    """Leave the modules of all tests out of collections, which come less often."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
