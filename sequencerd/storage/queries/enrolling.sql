-- Statements of scheduled enrolling: which runs are due, what the users' queries return, and the results.

-- name: schedules
-- Read the sequences that enroll what a query returns, with their last runs.
SELECT q.name AS sequence, q.timezone, q.status, q.enroll,
       q.enroll || jsonb_build_object('timezone', q.timezone) AS definition,
       r.definition AS scheduled, r.next_run_at, r.failures, r.problem, r.last_run_at
  FROM sequencer.sequences AS q LEFT JOIN sequencer.scheduled_runs AS r ON r.sequence = q.name
 WHERE q.enroll IS NOT NULL ORDER BY q.name;

-- name: try_lock_enrolling
-- Try to acquire the lock of the one daemon that enrolls by schedules, until the end of the transaction.
SELECT pg_try_advisory_xact_lock({enrolling_lock});

-- name: set_schedule
-- Record when a new or changed schedule is due. After a failed run it is due at once.
WITH known AS MATERIALIZED (
    SELECT q.name, CASE WHEN r.problem IS NULL THEN $3 ELSE now() END AS next_run_at
      FROM sequencer.sequences AS q LEFT JOIN sequencer.scheduled_runs AS r ON r.sequence = q.name
     WHERE q.name = $1
)
INSERT INTO sequencer.scheduled_runs (sequence, definition, next_run_at)
SELECT name, $2, next_run_at FROM known
ON CONFLICT (sequence) DO UPDATE
   SET definition = excluded.definition, failures = 0, next_run_at = excluded.next_run_at;

-- name: lock_run
-- Lock a run that is due, unless it was done or scheduled otherwise meanwhile.
SELECT true FROM sequencer.scheduled_runs WHERE sequence = $1 AND next_run_at = $2 FOR UPDATE;

-- name: finish_run
-- Record the result of a run, and when the next one is due.
UPDATE sequencer.scheduled_runs
   SET next_run_at = $3, last_run_at = $4, duration = $5, found = $6, enrolled = $7,
       problem = $8, failures = CASE WHEN $9 THEN failures + 1 ELSE 0 END
 WHERE sequence = $1 AND next_run_at = $2;

-- name: turn_notifications_on
-- Let the triggers notify daemons in this transaction, as for an application.
SELECT set_config('sequencer.notify', 'on', true);

-- name: enroll_subjects
-- Enroll subjects, and count them. Those that the reentry policy refuses are skipped.
SELECT count(*) FROM sequencer.enroll_all(array_fill($1::text, ARRAY[cardinality($2::text[])]),
                                          $2, $3::jsonb[], $4::text[], NULL);

-- name: read_only
-- Make this transaction read-only until the end of a savepoint in it, and limit its statements to so many
-- milliseconds.
SELECT set_config('transaction_read_only', 'on', true), set_config('statement_timeout', $1, true);

-- name: source_kind
-- Find whether a name is that of a view or table, or of a function without arguments.
SELECT CASE WHEN EXISTS (SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
                          WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'v', 'm', 'f', 'p'))
            THEN 'relation'
            WHEN EXISTS (SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
                          WHERE n.nspname = $1 AND p.proname = $2 AND p.pronargs = p.pronargdefaults)
            THEN 'function' END;

-- name: read_source
-- Read the subjects that a user's view or function returns, without those that the reentry policy
-- refuses; and after them some rows that cannot be enrolled. The source is validated before it is put in.
WITH returned AS MATERIALIZED (
    SELECT to_jsonb(s) AS line, to_jsonb(s)->>'subject' AS subject FROM (SELECT * FROM {source}) AS s
), numbered AS (
    SELECT r.line, r.subject, row_number() OVER (PARTITION BY r.subject) AS copy
      FROM returned AS r
     WHERE NOT EXISTS (
        SELECT FROM sequencer.enrollments AS e
         WHERE e.subject = r.subject AND e.sequence = $1 AND e.entry = 0
           AND NOT (e.reentry = 'after' AND e.status <> 'active' AND EXISTS (
               SELECT FROM sequencer.sequences AS q
                WHERE q.name = $1 AND q.reentry = 'after' AND sequencer.reentry_time(
                    e.ended_at, q.reentry_after, q.timezone) <= now())))
), checked AS (
    SELECT *, CASE WHEN NOT line ? 'subject' THEN 'with no column subject'
                   WHEN subject IS NULL THEN 'with NULL as the subject'
                   WHEN octet_length(subject) NOT BETWEEN 1 AND 1000
                   THEN 'with an empty subject, or one of more than 1000 bytes'
                   WHEN jsonb_typeof(line->'data') NOT IN ('object', 'null')
                   THEN 'with data that are not a JSON object'
                   WHEN copy > 1 THEN 'with a subject that another row has' END AS fault
      FROM numbered
)
(SELECT subject, line->'data' AS data, line->>'timezone' AS timezone, NULL AS fault FROM checked
  WHERE fault IS NULL LIMIT $2)
UNION ALL
(SELECT NULL, NULL, NULL, fault FROM checked WHERE fault IS NOT NULL LIMIT 1000);
