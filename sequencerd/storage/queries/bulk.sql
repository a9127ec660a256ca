-- Statements that change enrollments and sequences by hand.

-- part: selection
-- The enrollments that an operator selects. Planned for its arguments, so that each filter finds its
-- index.
  FROM sequencer.enrollments
 WHERE ($1::bigint[] IS NULL OR id = ANY ($1)) AND ($2::text IS NULL OR subject = $2)
   AND ($3::text IS NULL OR sequence = $3) AND ($4::text IS NULL OR step = $4)
   AND ($5::text IS NULL OR failure = $5)
   AND status = ANY ($6::text[]) AND ($7::text IS NULL OR step <> $7)

-- name: select
-- Find the selected enrollments, in no order: a million would be sorted on disk.
SELECT id
{selection};

-- name: selected
-- Count the selected enrollments by sequence, step, status and failure.
SELECT sequence, step, status, failure, count(*)
{selection}
 GROUP BY sequence, step, status, failure ORDER BY sequence, step, status, failure;

-- name: with_step
-- Find which of the sequences have a step of this name.
SELECT sequence FROM sequencer.steps WHERE name = $1 AND sequence = ANY ($2::text[]);

-- name: set_reason
-- Set the reason that the events of this transaction record.
SELECT set_config('sequencer.reason', $1, true);

-- name: retry
-- Resume failed enrollments at the step where they failed.
WITH locked AS (
    SELECT id FROM sequencer.enrollments
     WHERE id = ANY ($1::bigint[]) AND status = 'failed' ORDER BY id FOR UPDATE
)
UPDATE sequencer.enrollments AS e SET status = 'active'
  FROM locked WHERE e.id = locked.id
RETURNING false AS executing;

-- name: skip
-- Resume failed enrollments as if their step had answered "next".
WITH locked AS (
    SELECT e.id, s.next_step
      FROM sequencer.enrollments AS e
      JOIN sequencer.steps AS s ON s.sequence = e.sequence AND s.name = e.step
     WHERE e.id = ANY ($1::bigint[]) AND e.status = 'failed' ORDER BY e.id FOR UPDATE OF e
)
UPDATE sequencer.enrollments AS e
   SET step = coalesce(locked.next_step, e.step),
       status = CASE WHEN locked.next_step IS NULL THEN 'completed' ELSE 'active' END
  FROM locked WHERE e.id = locked.id
RETURNING false AS executing;

-- name: cancel
-- Cancel active and failed enrollments; return for each whether a side effect was executing.
WITH locked AS (
    SELECT id, leased_by FROM sequencer.enrollments
     WHERE id = ANY ($1::bigint[]) AND status IN ('active', 'failed') ORDER BY id FOR UPDATE
)
UPDATE sequencer.enrollments AS e SET status = 'cancelled'
  FROM locked WHERE e.id = locked.id
RETURNING locked.leased_by IS NOT NULL AS executing;

-- name: move
-- Move active and failed enrollments to another step; return for each whether a side effect was
-- executing.
WITH locked AS (
    SELECT id, leased_by FROM sequencer.enrollments
     WHERE id = ANY ($1::bigint[]) AND status IN ('active', 'failed') AND step <> $2
     ORDER BY id FOR UPDATE
)
UPDATE sequencer.enrollments AS e SET step = $2, status = 'active'
  FROM locked WHERE e.id = locked.id
RETURNING locked.leased_by IS NOT NULL AS executing;

-- name: reevaluate
-- Reevaluate waiting enrollments.
SELECT false AS executing FROM generate_series(1, sequencer.reevaluate(ids => $1::bigint[]));

-- name: set_sequence_status
-- Set the status of sequences; return the former one and how many enrollments are active.
WITH before AS (
    SELECT name, status FROM sequencer.sequences WHERE name = ANY ($1::text[])
     ORDER BY name FOR UPDATE
), changed AS (
    UPDATE sequencer.sequences AS s SET status = $2
      FROM before WHERE s.name = before.name AND before.status <> $2
)
SELECT name, status AS before,
       (SELECT count(*) FROM sequencer.enrollments AS e
         WHERE e.sequence = before.name AND e.status = 'active') AS active
  FROM before;
