"""Copies of a database, each for one test at a time.

A copy in which a test has changed rows alone, and few, is emptied for the next test: that takes a
fifth of the time of a new copy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from tests.helpers.databases import Administrator, with_database

MAX_BYTES = 10 * 8192  # PostgreSQL plans for as many pages of a table without statistics
MAX_CHECKS = 20  # for sessions that are ending

IN_USE = """
    SELECT FROM pg_database AS d
     WHERE datname = current_database()
       AND (EXISTS (SELECT FROM pg_stat_get_activity(NULL)
                     WHERE datid = d.oid AND pid <> pg_backend_pid())
         OR EXISTS (SELECT FROM pg_prepared_xacts WHERE database = datname)
         OR EXISTS (SELECT FROM pg_replication_slots WHERE database = datname)
         OR EXISTS (SELECT FROM pg_db_role_setting WHERE setdatabase = d.oid)
         OR datconnlimit <> -1 OR datacl IS NOT NULL)
"""
CHANGED = f"""
    SELECT format('%I.%I', nspname, relname) AS name,
           relkind = 'r' AND nspname <> 'pg_catalog' AND statistics = 0
           AND pg_relation_size(c.oid) <= {MAX_BYTES} AS can_be_emptied
      FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace,
           LATERAL (SELECT pg_stat_get_tuples_inserted(c.oid) + pg_stat_get_tuples_updated(c.oid)
                           + pg_stat_get_tuples_deleted(c.oid) AS rows,
                           pg_stat_get_vacuum_count(c.oid) + pg_stat_get_autovacuum_count(c.oid)
                           + pg_stat_get_analyze_count(c.oid)
                           + pg_stat_get_autoanalyze_count(c.oid) AS statistics) AS changes
     WHERE relkind IN ('r', 't') AND NOT relisshared AND rows + statistics > 0
"""
"""The tables that former sessions have changed since the database was made, catalogs included:
whatever changes the schema, a privilege or a comment changes a row of them.
"""
FILLED = """
    SELECT format('%I.%I', nspname, relname) AS name
      FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
     WHERE relkind = 'r' AND nspname NOT IN ('pg_catalog', 'information_schema')
       AND pg_relation_size(c.oid) > 0
"""
RESTART = """
    SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false)
      FROM pg_sequences WHERE last_value IS NOT NULL
"""


class Copies:
    """Copies of a template. `server` is connected to another database."""

    def __init__(self, server: Administrator, url: str, template: str) -> None:
        self._server = server
        self._url = url
        self._template = template
        self._emptied: _Copy | None = None

    @contextmanager
    def one(self) -> Iterator[str]:
        """The URL of a copy, for as long as it is used."""
        copy = self._emptied or _Copy(self._server, self._url, self._template)
        self._emptied = None
        yield copy.url
        if copy.is_emptied():
            self._emptied = copy
        else:
            copy.drop()

    def close(self) -> None:
        if self._emptied:
            self._emptied.drop()


class _Copy:
    """A copy, and a connection to it. A crash of the server, which forgets what was changed, ends
    the connection as well.
    """

    def __init__(self, server: Administrator, url: str, template: str) -> None:
        self._server = server
        self._name = server.create(template)
        self.url = with_database(url, self._name)
        self._own = Administrator(self.url)
        self._own.execute("SET session_replication_role = replica")
        self._fixed = {name for (name,) in self._own.fetch(FILLED)}

    def is_emptied(self) -> bool:
        """Delete all rows. Return False if the copy differs from a new one nevertheless."""
        try:
            for _ in range(MAX_CHECKS):
                if not self._own.fetch(IN_USE):
                    return self._empty()
                time.sleep(0.005)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            pass
        return False

    def _empty(self) -> bool:
        changed = self._own.fetch(CHANGED)
        if not all(row["can_be_emptied"] and row["name"] not in self._fixed for row in changed):
            return False
        deletions = [f"DELETE FROM {row['name']}" for row in changed]
        self._own.execute("; ".join([*deletions, RESTART]))
        return True

    def drop(self) -> None:
        self._own.close()
        self._server.drop(self._name)
