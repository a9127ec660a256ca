-- Statements that read the original's tables and write its enrollments here.

-- name: original_columns
-- Read the columns of the original's tables.
SELECT c.relname::text AS "table", a.attname::text AS column
  FROM pg_attribute AS a
  JOIN pg_class AS c ON c.oid = a.attrelid
  JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE n.nspname = $1 AND c.relname IN ('sequences', 'steps', 'runners')
   AND c.relkind IN ('r', 'v', 'm', 'f', 'p') AND a.attnum > 0 AND NOT a.attisdropped;

-- name: original_sequences
-- Read the sequences of the original.
SELECT id::text, title::text, "firstStep"::text AS first_step FROM {schema}.sequences
 ORDER BY sequences.id;

-- name: original_steps
-- Read the steps of the original.
SELECT id::text, "sequenceId"::text AS sequence, "nextStep"::text AS next,
       "altNextStep"::text AS alt_next, type::text, config::text,
       coalesce("requiresExternalData", false) AS reads_external
  FROM {schema}.steps ORDER BY steps.id;

-- name: original_runners
-- Read the enrollments of the original. Times without a zone are UTC, as its server wrote them; the
-- session is set to it.
SELECT r.id::text, r."dataLookup"::text AS subject, r."sequenceId"::text AS sequence,
       r."stepId"::text AS step, coalesce(r."isActive", false) AS is_active, possible,
       CASE WHEN possible THEN r."startSequence"::timestamptz END AS started_at,
       CASE WHEN possible THEN r."endSequence"::timestamptz END AS ended_at,
       CASE WHEN possible THEN r."startStep"::timestamptz END AS entered_at
  FROM {schema}.runners AS r CROSS JOIN LATERAL (
       SELECT coalesce(bool_and(time BETWEEN '1900-01-01Z' AND '9999-01-01Z'), true)
         FROM (VALUES (r."startSequence"::timestamptz), (r."endSequence"::timestamptz),
                      (r."startStep"::timestamptz)) AS times (time)) AS t (possible)
 ORDER BY r."startSequence", r.id;

-- name: original_repeated
-- Find the sequences of the original in which a subject is active more than once.
SELECT "sequenceId"::text AS sequence FROM {schema}.runners
 WHERE "isActive" GROUP BY "sequenceId", "dataLookup" HAVING count(*) > 1;

-- name: import_people
-- Import enrollments, except those that exist: the same subject, created at the same time.
WITH written AS (
INSERT INTO sequencer.enrollments
       (sequence, step, subject, status, created_at, entered_at, ended_at, wake_at, goals_met)
SELECT p.sequence, p.step, p.subject, p.status, p.created_at, p.entered_at, p.ended_at,
       CASE WHEN p.status = 'active' THEN now() END, string_to_array(p.goals_met, E'\n')
  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamptz[],
              $6::timestamptz[], $7::timestamptz[], $8::text[]) WITH ORDINALITY
       AS p (sequence, step, subject, status, created_at, entered_at, ended_at, goals_met, number)
 WHERE NOT EXISTS (
    SELECT FROM sequencer.enrollments AS e
     WHERE e.subject = p.subject AND e.sequence = p.sequence AND e.created_at = p.created_at)
 ORDER BY p.number
RETURNING sequence, status
)
SELECT sequence, status, count(*) FROM written GROUP BY sequence, status;

-- name: use_utc
-- Set the time zone of the transaction to UTC.
SET LOCAL timezone = 'UTC';
