-- Statements of plan, apply, history and export.

-- name: apply_sequence
-- Insert or update a sequence. ON CONFLICT is not used, because its refused insert would draw a revision
-- number.
WITH changed AS (
    UPDATE sequencer.sequences AS q
       SET first_step = $2, timezone = $3, status = $4, reentry = $5, lookup = $6, recheck = $7,
           description = $8, reentry_after = $9::text::interval, time_window = $10,
           enroll = $11, topic = $12, locale = $13, partials = $14,
           brake_at_most = $15, brake_per = make_interval(secs => $16)
     WHERE q.name = $1
       AND (q.first_step, q.timezone, q.status, q.reentry, q.lookup, q.recheck, q.description,
            q.reentry_after, q.time_window, q.enroll, q.topic, q.locale, q.partials,
            q.brake_at_most, q.brake_per)
           IS DISTINCT FROM ($2, $3, $4, $5, $6, $7, $8, $9::text::interval, $10, $11, $12, $13,
                             $14, $15, make_interval(secs => $16))
), unknown AS MATERIALIZED (
    SELECT WHERE NOT EXISTS (SELECT FROM sequencer.sequences AS q WHERE q.name = $1)
)
INSERT INTO sequencer.sequences (name, first_step, timezone, status, reentry, lookup, recheck,
                                 description, reentry_after, time_window, enroll, topic, locale,
                                 partials, brake_at_most, brake_per)
SELECT $1::text, $2::text, $3::text, $4::text, $5::text, $6::text, $7::interval, $8::text,
       $9::text::interval, $10::jsonb, $11::jsonb, $12::text, $13::text, $14::jsonb,
       $15::integer, make_interval(secs => $16::float8)
  FROM unknown;

-- name: brakes
-- Read the brakes of all sequences, or of one, that hold at present: `until` is the end of one that was
-- set by apply, `reason` why it has paused the sequence.
SELECT name AS sequence,
       CASE WHEN apply_brake_until > now() THEN apply_brake ELSE brake_at_most END AS at_most,
       CASE WHEN apply_brake_until > now() THEN interval '1 hour' ELSE brake_per END AS per,
       CASE WHEN apply_brake_until > now() THEN apply_brake_until END AS until,
       (SELECT b.reason FROM sequencer.brakes AS b WHERE b.sequence = name) AS reason
  FROM sequencer.sequences
 WHERE (brake_at_most IS NOT NULL OR apply_brake_until > now()) AND ($1::text IS NULL OR name = $1)
 ORDER BY name;

-- name: set_apply_brake
-- Give sequences a brake for a day.
UPDATE sequencer.sequences SET apply_brake = $2, apply_brake_until = now() + interval '1 day'
 WHERE name = ANY ($1::text[]);

-- name: apply_steps
-- Insert or update the steps of a sequence at once; unchanged steps are not touched.
INSERT INTO sequencer.steps (sequence, name, position, type, config, next_step, alt_next_step, seed)
SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::text[], $5::jsonb[], $6::text[], $7::text[],
                         $8::text[])
ON CONFLICT (sequence, name) DO UPDATE
   SET position = excluded.position, type = excluded.type, config = excluded.config,
       next_step = excluded.next_step, alt_next_step = excluded.alt_next_step,
       seed = excluded.seed
 WHERE (steps.position, steps.type, steps.config, steps.next_step, steps.alt_next_step, steps.seed)
       IS DISTINCT FROM (excluded.position, excluded.type, excluded.config, excluded.next_step,
                         excluded.alt_next_step, excluded.seed);

-- name: remove_steps
-- Delete the steps of a sequence that its definition no longer has.
DELETE FROM sequencer.steps WHERE sequence = $1 AND name <> ALL ($2::text[]);

-- name: missing_targets
-- Return the numbers of the sequences, or steps of these, that do not exist.
SELECT t.number::integer
  FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS t (sequence, step, number)
 WHERE NOT EXISTS (SELECT FROM sequencer.sequences AS q WHERE q.name = t.sequence)
    OR t.step IS NOT NULL AND NOT EXISTS (
           SELECT FROM sequencer.steps AS s WHERE (s.sequence, s.name) = (t.sequence, t.step))
 ORDER BY t.number;

-- name: is_lookup
-- Return whether a name is that of a function that lookups can call.
SELECT EXISTS (SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
                WHERE n.nspname = $1 AND p.proname = $2 AND p.proargtypes[0] = 'text[]'::regtype
                  AND p.pronargs - p.pronargdefaults <= 1);

-- name: named_elsewhere
-- Read the steps of other sequences whose configs name some steps of a sequence.
SELECT s.sequence, s.name, n.step
  FROM sequencer.steps AS s, sequencer.named_steps(s.type, s.sequence, s.config) AS n
 WHERE s.type IN ('GoTo', 'Switch', 'Split') AND s.sequence <> $1
   AND n.of_sequence = $1 AND n.step = ANY ($2::text[])
 ORDER BY s.sequence, s.position;

-- name: rename_step
-- Rename a step. Triggers update its enrollments and what leads to it.
UPDATE sequencer.steps SET name = $3 WHERE sequence = $1 AND name = $2;

-- name: move_enrollments
-- Move active and failed enrollments away from a step that is to be deleted, and count them.
WITH moved AS (
    UPDATE sequencer.enrollments SET step = $3
     WHERE id IN (SELECT id FROM sequencer.enrollments
                   WHERE sequence = $1 AND step = $2 AND status = 'active'
                   UNION ALL
                  SELECT id FROM sequencer.enrollments
                   WHERE sequence = $1 AND step = $2 AND status = 'failed')
    RETURNING 1
)
SELECT count(*) FROM moved;

-- name: lock_definitions
-- Lock all definitions until the end of the transaction: `apply` runs one at a time, and changes of
-- sequences by SQL wait. Steps are not locked, as daemons would wait, too: a change of a step by SQL, which
-- locks first the step and then the sequence, may end in a deadlock.
SELECT pg_advisory_xact_lock({definitions_lock}), (SELECT count(*) FROM (
    SELECT FROM sequencer.sequences ORDER BY name FOR UPDATE) AS locked);

-- name: documents
-- Read name, revision and status of all sequences, and the documents of some.
SELECT name, revision, status, from_file,
       CASE WHEN name = ANY ($1::text[]) THEN sequencer.document(name) END AS document
  FROM sequencer.sequences ORDER BY name;

-- name: as_jsonb
-- Normalise a document as PostgreSQL stores it, so that documents can be compared.
SELECT $1::jsonb;

-- name: count_at
-- Count the active enrollments at a step.
SELECT count(*) FROM sequencer.enrollments
 WHERE sequence = $1 AND step = $2 AND status = 'active';

-- name: enrollments_at
-- Read all active enrollments at a step that have begun.
SELECT {whole_enrollment}
  FROM sequencer.enrollments AS e
 WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active' AND e.entered_at IS NOT NULL;

-- name: holidays
-- Read the holidays of all calendars.
SELECT {holidays_by_calendar};

-- name: add_holidays
-- Add days to a calendar, and count the new ones; those that are there stay as they are.
WITH added AS (
    INSERT INTO sequencer.holidays (calendar, day, name)
    SELECT $1, * FROM unnest($2::date[], $3::text[])
    ON CONFLICT DO NOTHING RETURNING 1
)
SELECT count(*) FROM added;

-- name: topics
-- Read the topics that are listed.
SELECT name FROM sequencer.topics ORDER BY name;

-- name: topic_limits
-- Read the limits of all topics.
SELECT {limits_by_topic};

-- name: archive
-- Archive sequences.
UPDATE sequencer.sequences SET status = 'archived' WHERE name = ANY ($1::text[]);

-- name: mark_from_file
-- Record that sequences were applied from a file.
UPDATE sequencer.sequences SET from_file = true WHERE name = ANY ($1::text[]) AND NOT from_file;

-- name: revisions_of
-- Read the revisions of a sequence, the latest first, each with the document before it.
SELECT revision, at, by, reason, document, lag(document) OVER (ORDER BY revision) AS before
  FROM sequencer.revisions WHERE sequence = $1 ORDER BY revision DESC;

-- name: document
-- Read the document of a sequence, as it is or as it was in a revision.
SELECT CASE
    WHEN $2::bigint IS NULL THEN sequencer.document($1)
    WHEN $2 <= greatest((SELECT revision FROM sequencer.sequences WHERE name = $1),
                        (SELECT max(revision) FROM sequencer.revisions WHERE sequence = $1))
    THEN (SELECT document FROM sequencer.revisions WHERE sequence = $1 AND revision <= $2
           ORDER BY revision DESC LIMIT 1) END;

-- name: check_constraints
-- Check now what would be checked at the end of the transaction.
SET CONSTRAINTS ALL IMMEDIATE;

-- name: transaction_id
-- Read the id of the present transaction; none if it has written nothing.
SELECT pg_current_xact_id_if_assigned()::text;

-- name: transaction_outcome
-- Read the state of a transaction: committed, aborted or in progress.
SELECT pg_xact_status($1::text::xid8);
