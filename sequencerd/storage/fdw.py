"""The SQL of a front: a database in which applications see all shards as one table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from string import Template

from sequencerd.storage import conninfo
from sequencerd.storage.connections import Shard

SERVER_OPTIONS = {
    "async_capable": "true",  # several shards are read at once
    "batch_size": "1000",  # rows for each INSERT
    "parallel_commit": "true",
    "updatable": "true",
}
"""Options of postgres_fdw for each shard."""

_OF_USER = ("user", "password", "sslcert", "sslkey", "sslpassword")
_NOT_OF_SERVER = (
    *(*_OF_USER, "passfile", "client_encoding", "replication"),
    *("application_name", "fallback_application_name"),
)


def front(shards: Mapping[str, Shard]) -> str:
    """Return the statements for psql, with the shards numbered in their order.

    A password is not printed: the statement refers to the variable `password_NAME` of psql. Raises
    SettingsError.
    """
    text = (files("sequencerd.storage") / "front.sql").read_text("utf-8")
    tables, shard_of_it = text.split("-- for each shard")
    made = [Template(tables).substitute(shards=len(shards))]
    variables = password_variables(shards)
    for number, (name, shard) in enumerate(shards.items()):
        given = conninfo.complete(shard.url)
        login = {key: _literal(given[key]) for key in _OF_USER if key in given}
        if "password" in login:
            login["password"] = f":'{variables[name]}'"
        else:  # or only a superuser of the front could use it
            login["password_required"] = "'false'"  # noqa: S105 - no password
        server = {
            key: _literal(value)
            for key, value in (given | SERVER_OPTIONS).items()
            if key not in _NOT_OF_SERVER
        }
        made.append(
            Template(f"-- shard {number}{shard_of_it}").substitute(
                number=number,
                schema=_literal(shard.schema),
                server=_identifier(f"sequencer_{name}"),
                server_options=_options(server),
                user_options=_options(login),
                enrollments=_identifier(f"enrollments_{name}"),
                reevaluations=_identifier(f"reevaluations_{name}"),
            )
        )
    return "\n".join(made)


def password_variables(shards: Iterable[str]) -> dict[str, str]:
    """Return psql's variable for the password of each shard. Their names have fewer characters than
    those of shards: of two that would be the same, the later one gets the number of its shard.
    """
    found: dict[str, str] = {}
    for number, shard in enumerate(shards):
        variable = "password_" + re.sub(r"\W", "_", shard, flags=re.ASCII)
        found[shard] = f"{variable}_{number}" if variable in found.values() else variable
    return found


def _options(options: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


def _literal(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"


def _identifier(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
