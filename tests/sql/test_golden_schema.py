"""The schema as a readable text, compared with tests/sql/schema.txt.

Read from the catalogs instead of pg_dump, so that it is the same in every version of PostgreSQL:
tables with columns and grants, constraints, indexes, triggers, policies, views and functions.
"""

from __future__ import annotations

import os
from pathlib import Path

import asyncpg

from tests.helpers.databases import in_usual_schema

GOLDEN = Path(__file__).parent / "schema.txt"
RENEW = "RENEW=1 .venv/bin/pytest -q tests/sql/test_golden_schema.py && git diff tests/sql"

# Months of the history are left out: they depend on the date.
CATALOGS = r"""
WITH tables AS (
    SELECT c.*, format('%s %s', CASE c.relkind WHEN 'v' THEN 'view' WHEN 'S' THEN 'sequence'
                                               ELSE 'table' END, c.relname) AS title
      FROM pg_class AS c
     WHERE c.relnamespace = 'sequencer'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'S')
       AND c.relname !~ '^events_\d{4}_\d\d$'
), functions AS (
    SELECT p.*, format('function %s(%s) returns %s', p.proname,
                       pg_get_function_arguments(p.oid), pg_get_function_result(p.oid))
           AS title
      FROM pg_proc AS p WHERE p.pronamespace = 'sequencer'::regnamespace
), lines (title, kind, position, line) AS (
    SELECT title, 0, 0, concat_ws(', ',
           CASE WHEN relkind = 'p' THEN 'partition by ' || pg_get_partkeydef(oid) END,
           CASE WHEN relispartition THEN pg_get_expr(relpartbound, oid) END,
           CASE WHEN relreplident = 'f' THEN 'replica identity full' END,
           array_to_string(reloptions, ', '))
      FROM tables
    UNION ALL
    SELECT t.title, 1, a.attnum, format('column %s %s', a.attname, concat_ws(' ',
           format_type(a.atttypid, a.atttypmod),
           CASE WHEN co.collname <> 'default' THEN format('collate %s', co.collname) END,
           CASE WHEN a.attnotnull THEN 'not null' END,
           CASE a.attidentity WHEN 'd' THEN 'identity by default' WHEN 'a' THEN 'identity' END,
           CASE WHEN a.attgenerated = 's' THEN 'generated'
                WHEN d.oid IS NOT NULL THEN 'default' END,
           pg_get_expr(d.adbin, d.adrelid)))
      FROM tables AS t JOIN pg_attribute AS a ON a.attrelid = t.oid
      LEFT JOIN pg_attrdef AS d ON d.adrelid = t.oid AND d.adnum = a.attnum
      LEFT JOIN pg_collation AS co ON co.oid = a.attcollation
     WHERE a.attnum > 0 AND NOT a.attisdropped AND t.relkind <> 'S'
    UNION ALL
    SELECT t.title, 2, 0, format('constraint %s %s', c.conname, pg_get_constraintdef(c.oid))
      FROM tables AS t JOIN pg_constraint AS c ON c.conrelid = t.oid
     WHERE c.contype IN ('p', 'u', 'f', 'c') AND c.conparentid = 0
    UNION ALL
    SELECT t.title, 3, 0, pg_get_indexdef(i.indexrelid)
      FROM tables AS t JOIN pg_index AS i ON i.indrelid = t.oid
     WHERE NOT EXISTS (SELECT FROM pg_constraint AS c WHERE c.conindid = i.indexrelid)
    UNION ALL
    SELECT t.title, 4, 0, pg_get_triggerdef(g.oid)
      FROM tables AS t JOIN pg_trigger AS g ON g.tgrelid = t.oid
     WHERE NOT g.tgisinternal AND g.tgparentid = 0
    UNION ALL
    SELECT t.title, 5, 0, format('policy %s for %s to %s using (%s) with check (%s)', p.polname,
           p.polcmd, (SELECT string_agg(r::regrole::text, ', ') FROM unnest(p.polroles) AS r),
           pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
      FROM tables AS t JOIN pg_policy AS p ON p.polrelid = t.oid
    UNION ALL
    SELECT f.title, 0, 0, concat_ws(', ', l.lanname,
           CASE f.provolatile WHEN 'i' THEN 'immutable' WHEN 's' THEN 'stable' END,
           CASE WHEN f.proisstrict THEN 'strict' END,
           CASE WHEN f.prosecdef THEN 'security definer' END,
           'set ' || array_to_string(f.proconfig, ', set '))
      FROM functions AS f JOIN pg_language AS l ON l.oid = f.prolang
    UNION ALL
    SELECT o.title, 6, 0, format('grant %s to %s',
           string_agg(o.privilege, ', ' ORDER BY o.privilege),
           CASE o.grantee WHEN 0 THEN 'public' ELSE o.grantee::regrole::text END)
      FROM (
        SELECT g.title, g.grantee, g.privilege || coalesce(' (' || string_agg(
               g.attname, ', ' ORDER BY g.attnum) || ')', '') AS privilege
          FROM (
            SELECT t.title, a.grantee, lower(a.privilege_type) AS privilege,
                   NULL::name AS attname, 0 AS attnum, t.relowner AS owner
              FROM tables AS t CROSS JOIN aclexplode(t.relacl) AS a
            UNION ALL
            SELECT t.title, a.grantee, lower(a.privilege_type), b.attname, b.attnum, t.relowner
              FROM tables AS t JOIN pg_attribute AS b ON b.attrelid = t.oid
             CROSS JOIN aclexplode(b.attacl) AS a
            UNION ALL
            SELECT f.title, a.grantee, lower(a.privilege_type), NULL, 0, f.proowner
              FROM functions AS f
             CROSS JOIN aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) AS a
          ) AS g (title, grantee, privilege, attname, attnum, owner)
         WHERE g.grantee <> g.owner
         GROUP BY g.title, g.grantee, g.privilege, g.attname IS NULL
      ) AS o (title, grantee, privilege)
     GROUP BY o.title, o.grantee
)
SELECT title, regexp_replace(line, '\s+', ' ', 'g') AS line FROM lines WHERE line <> ''
 ORDER BY title COLLATE "C", kind, position, lines.line COLLATE "C"
"""


@in_usual_schema
async def test_the_schema_is_as_reviewed(connection: asyncpg.Connection) -> None:
    text = await describe(connection)
    if os.environ.get("RENEW"):
        GOLDEN.write_text(text, encoding="utf-8")
    golden = GOLDEN.read_text(encoding="utf-8")
    assert text == golden, f"the schema has changed; review it with: {RENEW}"


async def describe(connection: asyncpg.Connection) -> str:
    """Return a paragraph for each table, view, sequence and function."""
    await connection.execute("SET timezone = 'UTC'; SET search_path = pg_catalog")
    paragraphs: dict[str, list[str]] = {}
    for row in await connection.fetch(CATALOGS):
        paragraphs.setdefault(row["title"], []).append(f"    {row['line']}\n")
    return "\n".join(title + "\n" + "".join(lines) for title, lines in paragraphs.items())
