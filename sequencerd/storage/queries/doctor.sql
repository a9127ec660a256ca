-- Statements of the doctor.

-- name: reported_problems
-- Read which sequences a brake has paused, and what living daemons report; once where several report
-- the same. Single enrollments come last, as they can be many.
SELECT * FROM (
    SELECT 'brake' AS kind, sequence AS about, sequence, NULL AS step, paused_at AS since,
           NULL::bigint AS waiting,
           format('the sequence is paused by its %s; sequencerd resume %s continues it, and starts counting again',
                  reason, sequence) AS message, NULL AS daemon
      FROM sequencer.brakes WHERE reason IS NOT NULL AND ($1::text IS NULL OR sequence = $1)
    UNION ALL (
    SELECT DISTINCT ON (p.kind, p.about)
           p.kind, p.about, p.sequence, p.step, p.since, p.waiting, p.message, p.daemon
      FROM sequencer.problems AS p JOIN sequencer.daemons AS d ON d.name = p.daemon
     WHERE d.alive_until > now() AND ($1::text IS NULL OR p.sequence = $1 OR p.sequence IS NULL)
     ORDER BY p.kind, p.about, p.since)
) AS found
 ORDER BY kind = 'quarantined', kind, since, about LIMIT $2;

-- name: braked_sequences
-- Read which sequences their brakes have paused, and why.
SELECT sequence, reason FROM sequencer.brakes WHERE reason IS NOT NULL ORDER BY sequence LIMIT 100;

-- name: server_facts
-- Read what `doctor` checks about the server and the session.
SELECT current_setting('server_version') AS version, pg_is_in_recovery() AS is_standby,
       pg_backend_pid() AS pid, current_setting('default_transaction_read_only') = 'on' AS is_read_only,
       current_setting('idle_session_timeout')::interval AS idle_timeout;

-- name: citus_settings
-- Find the settings that differ from what is needed where Citus has distributed the tables: for triggers and
-- functions on its nodes, for reasons, and for connections that open within milliseconds.
SELECT s.name, s.value FROM (VALUES ('citus.enable_unsafe_triggers', 'on'),
                                    ('citus.allow_nested_distributed_execution', 'on'),
                                    ('citus.propagate_set_commands', 'local'),
                                    ('citus.override_table_visibility', 'off')) AS s (name, value)
 WHERE {on_citus} AND current_setting(s.name, true) IS DISTINCT FROM s.value;

-- name: present_triggers
-- Read the triggers of the schema, and whether they are enabled.
SELECT c.relname::text AS "table", t.tgname::text AS name, t.tgenabled IN ('O', 'A') AS fires
  FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
 WHERE c.relnamespace = 'sequencer'::regnamespace AND NOT t.tgisinternal AND t.tgparentid = 0;

-- name: lacking_privileges
-- Find the privileges that the role of daemons has and the present user lacks.
WITH granted (object, privilege, has) AS MATERIALIZED (
    SELECT c.oid::regclass::text, a.privilege_type,
           CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, a.privilege_type)
                          ELSE has_table_privilege(c.oid, a.privilege_type) END
      FROM pg_class AS c CROSS JOIN aclexplode(c.relacl) AS a
     WHERE c.relnamespace = 'sequencer'::regnamespace AND a.grantee = to_regrole('sequencer_daemon')
    UNION ALL
    SELECT c.oid::regclass::text, a.privilege_type,
           has_column_privilege(c.oid, b.attnum, a.privilege_type)
      FROM pg_class AS c JOIN pg_attribute AS b ON b.attrelid = c.oid
     CROSS JOIN aclexplode(b.attacl) AS a
     WHERE c.relnamespace = 'sequencer'::regnamespace AND a.grantee = to_regrole('sequencer_daemon')
    UNION ALL
    SELECT p.oid::regprocedure::text, a.privilege_type, has_function_privilege(p.oid, a.privilege_type)
      FROM pg_proc AS p CROSS JOIN aclexplode(p.proacl) AS a
     WHERE p.pronamespace = 'sequencer'::regnamespace AND a.grantee = to_regrole('sequencer_daemon')
)
SELECT format('%s ON %s', string_agg(DISTINCT privilege, ', '), object) AS missing
  FROM granted WHERE NOT has GROUP BY object ORDER BY object LIKE '%(%', object;

-- name: is_superuser
-- Check whether the present user is a superuser.
SELECT rolsuper FROM pg_roles WHERE rolname = current_user;

-- name: notify
-- Send an empty notification, to test that notifications arrive.
SELECT pg_notify($1, '');

-- name: count_daemons
-- Count the running daemons.
SELECT count(*) FROM sequencer.daemons WHERE alive_until > now();

-- name: zones_in_use
-- Convert times a month apart to the time zones of sequences, to compare with Python's.
SELECT q.timezone, month AS at, month AT TIME ZONE q.timezone AS local
  FROM (SELECT DISTINCT timezone FROM sequencer.sequences) AS q
 CROSS JOIN generate_series(date_trunc('month', now()), now() + interval '2 years',
                            interval '1 month') AS month;

-- name: vacuum_facts
-- Read the settings and statistics of vacuum for the table of enrollments.
SELECT current_setting('autovacuum') = 'on' AS is_on, current_setting('track_counts') = 'on' AS counts,
       coalesce(c.reloptions, '{}')::text[] AS options, s.n_live_tup AS live, s.n_dead_tup AS dead,
       greatest(s.last_autovacuum, s.last_vacuum) AS last_vacuum
  FROM pg_class AS c JOIN pg_stat_user_tables AS s ON s.relid = c.oid
 WHERE c.oid = 'sequencer.enrollments'::regclass;

-- name: old_snapshots
-- Find what keeps dead rows from being vacuumed, and since when.
SELECT format('process %s of %s (%s)', pid, usename, coalesce(nullif(application_name, ''), state))
       AS what, now() - xact_start AS age
  FROM pg_stat_activity
 WHERE backend_xmin IS NOT NULL AND xact_start < now() - $1::interval
UNION ALL
SELECT format('prepared transaction %L', gid), now() - prepared
  FROM pg_prepared_xacts WHERE prepared < now() - $1::interval
UNION ALL
SELECT format('replication slot %s, which no client reads', slot_name), NULL
  FROM pg_replication_slots WHERE NOT active AND (xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
 ORDER BY age DESC NULLS LAST;

-- name: count_overdue
-- Count the overdue enrollments, and find the longest delay.
SELECT count(*), max(overdue_by) AS longest FROM sequencer.overdue;

-- name: failed_by_code
-- Count the failed enrollments by failure code.
SELECT failure, count(*) FROM sequencer.enrollments
 WHERE status = 'failed' GROUP BY failure ORDER BY count(*) DESC;

-- name: last_holidays
-- Read the last day of each calendar of holidays that definitions use.
SELECT used.calendar, max(h.day) AS last_day
  FROM (SELECT time_window->>'holidays' AS calendar FROM sequencer.sequences
        UNION
        SELECT jsonb_path_query(config, '$.**.holidays') #>> '{}' FROM sequencer.steps) AS used
  JOIN sequencer.holidays AS h ON h.calendar = used.calendar
 GROUP BY used.calendar ORDER BY used.calendar;

-- name: rates_reached
-- Read the runners whose calls recently waited for their rate limit.
SELECT runner, per_second FROM sequencer.rates
 WHERE reached_at > now() - interval '1 hour' ORDER BY runner;

-- name: problems
-- Read the steps that cannot be executed, and why.
SELECT sequence, name AS step, problem FROM sequencer.steps
 WHERE problem IS NOT NULL ORDER BY sequence, position;

-- name: number_generators
-- Read the generators of ids and revisions, and which of them, as far as this user may read them, would generate
-- a number that is in use. Logical replication does not copy them.
WITH used (generator, highest) AS (
    SELECT 'sequencer.enrollments_id_seq'::regclass, (SELECT max(id) FROM sequencer.enrollments)
    UNION ALL
    SELECT to_regclass('sequencer.revision_numbers'),
           (SELECT max(revision) FROM (SELECT revision FROM sequencer.sequences UNION ALL
                                       SELECT revision FROM sequencer.revisions) AS r)
)
SELECT generator::text, highest,
       CASE WHEN has_sequence_privilege(generator, 'SELECT')
            THEN coalesce(pg_sequence_last_value(generator), 0) < coalesce(highest, 0) END AS is_behind
  FROM used WHERE generator IS NOT NULL;

-- name: partition_facts
-- Check whether the history has a partition for this month, rows outside of all partitions, and rows in the
-- future: this reads the partitions of later months, which are empty.
SELECT to_regclass(format('sequencer.events_%s', to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')))
       IS NOT NULL AS has_month,
       EXISTS (SELECT FROM sequencer.events_other) AS has_others,
       (SELECT max(at) FROM sequencer.events
         WHERE at >= date_trunc('month', now(), 'UTC') + interval '1 month 1 day') AS ahead;

-- name: types_in_use
-- Read the step types that definitions use.
SELECT DISTINCT type FROM sequencer.steps;

-- name: lookups_in_use
-- Read the lookups that sequences name, and whether each is an SQL function.
SELECT DISTINCT lookup AS name, to_regprocedure(lookup || '(text[])') IS NOT NULL AS is_function
  FROM sequencer.sequences WHERE lookup IS NOT NULL;

-- name: common_facts
-- Read what all shards should have in common, as JSON objects; NULL where there is nothing to compare.
SELECT jsonb_build_object('PostgreSQL', current_setting('server_version_num')::integer / 10000)::text AS server,
       (SELECT coalesce(jsonb_object_agg(name, sequencer.document(name)), '{}')
          FROM sequencer.sequences)::text AS definitions,
       (SELECT coalesce(jsonb_object_agg(t.name, to_jsonb(t)), '{}') FROM sequencer.topics AS t)::text AS topics,
       (SELECT coalesce(jsonb_object_agg(h.calendar, h.days), '{}')
          FROM (SELECT calendar, jsonb_agg(day ORDER BY day) AS days
                  FROM sequencer.holidays GROUP BY calendar) AS h)::text AS holidays,
       (SELECT jsonb_object_agg(name, true)
          FROM (SELECT DISTINCT unnest(types) AS name
                  FROM sequencer.daemons WHERE alive_until > now()) AS t)::text AS "step types";
