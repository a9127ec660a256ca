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
SELECT id::text, title::text, {description}::text AS description, "firstStep"::text AS first_step
  FROM {schema}.sequences ORDER BY sequences.id;

-- name: original_steps
-- Read the steps of the original.
SELECT "sequenceId"::text AS sequence, id::text, type::text, config::text, "nextStep"::text AS next,
       "altNextStep"::text AS alt_next, coalesce("requiresExternalData", false) AS reads_external
  FROM {schema}.steps ORDER BY steps.id;

-- name: original_runners
-- Read the enrollments of the original. Times without a zone are UTC, as its server wrote them; the
-- session is set to it.
SELECT r.id::text, r."dataLookup"::text AS subject, r."sequenceId"::text AS sequence,
       r."stepId"::text AS step, coalesce(r."isActive", false) AS is_active, possible,
       CASE WHEN possible THEN r."startSequence"::timestamptz END AS started_at,
       CASE WHEN possible THEN r."endSequence"::timestamptz END AS ended_at,
       CASE WHEN possible THEN r."startStep"::timestamptz END AS entered_at,
       CASE WHEN possible THEN {created}::timestamptz END AS made_at
  FROM {schema}.runners AS r CROSS JOIN LATERAL (
       SELECT coalesce(bool_and(time BETWEEN '1900-01-01Z' AND '9999-01-01Z'), true)
         FROM (VALUES (r."startSequence"::timestamptz), (r."endSequence"::timestamptz),
                      (r."startStep"::timestamptz), ({created}::timestamptz)) AS times (time)
       ) AS t (possible)
 ORDER BY coalesce(r."startSequence", {created}, r."startStep"), r.id;

-- name: original_repeated
-- Find the sequences of the original in which a subject is active more than once.
SELECT "sequenceId"::text AS sequence FROM {schema}.runners
 WHERE "isActive" GROUP BY "sequenceId", "dataLookup" HAVING count(*) > 1;

-- name: imported_sequences
-- Read the sequences that were imported before, or that have the name of one to be imported, with the names
-- of their steps by the original's ids.
SELECT q.name, q.original_id, sequencer.document(q.name) AS document,
       (SELECT coalesce(jsonb_object_agg(s.original_id, s.name), '{}') FROM sequencer.steps AS s
         WHERE s.sequence = q.name AND s.original_id IS NOT NULL) AS steps
  FROM sequencer.sequences AS q
 WHERE q.original_id = ANY ($1::text[]) OR q.original_id IS NULL AND q.name = ANY ($2::text[])
 ORDER BY q.name;

-- name: mark_sequence
-- Record which sequence of the original this one is.
UPDATE sequencer.sequences SET original_id = $2 WHERE name = $1;

-- name: mark_steps
-- Record which steps of the original these are.
UPDATE sequencer.steps AS s SET original_id = o.id
  FROM unnest($2::text[], $3::text[]) AS o (name, id)
 WHERE s.sequence = $1 AND s.name = o.name;

-- name: import_enrollments
-- Import enrollments, except those that were imported before. Return the others, and whether they
-- were written: the reentry policy may refuse them. A note becomes an event.
WITH given AS (
    SELECT * FROM unnest(
        $1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
        $7::timestamptz[], $8::timestamptz[], $9::text[], $10::text[]) WITH ORDINALITY
        AS p (original_id, sequence, step, subject, status, created_at, entered_at, ended_at,
              goals_met, note, number)
     WHERE NOT EXISTS (
        SELECT FROM sequencer.enrollments AS e
         WHERE e.original_id = p.original_id AND e.created_at = p.created_at)
), written AS (
    INSERT INTO sequencer.enrollments
           (sequence, step, subject, status, created_at, entered_at, ended_at, wake_at, goals_met,
            original_id)
    SELECT sequence, step, subject, status, created_at, entered_at, ended_at,
           CASE WHEN status = 'active' THEN now() END, string_to_array(goals_met, E'\n'), original_id
      FROM given ORDER BY number
    ON CONFLICT (subject, sequence, entry) DO NOTHING
    RETURNING id, sequence, step, visit, original_id
), noted AS (
    INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)
    SELECT w.id, clock_timestamp(), w.sequence, w.step, w.visit, 'moved', g.note
      FROM written AS w JOIN given AS g USING (original_id) WHERE g.note IS NOT NULL
)
SELECT g.original_id, w.id IS NOT NULL AS is_written
  FROM given AS g LEFT JOIN written AS w USING (original_id);

-- name: highest_original_id
-- Read the highest id that an imported enrollment had in the original.
SELECT max(original_id::bigint) FROM sequencer.enrollments WHERE original_id ~ '^[0-9]{1,15}$';

-- name: leave_original_ids
-- Let later enrollments get ids above one, so that they can be told from those of the original.
SELECT setval('sequencer.enrollments_id_seq', $1::bigint)
 WHERE $1::bigint > coalesce(pg_sequence_last_value('sequencer.enrollments_id_seq'), 0);

-- name: use_utc
-- Set the time zone of the transaction to UTC.
SET LOCAL timezone = 'UTC';
