-- Statements that change enrollments and sequences by hand.

-- part: cause
-- The cause of an error: the part of its message that is the same for all enrollments. Addresses, quoted
-- texts, numbers and ids are replaced. A reply code of SMTP or HTTP is kept: it is marked until the numbers
-- are replaced.
replace(regexp_replace(regexp_replace(regexp_replace(regexp_replace(left(coalesce(e.last_error, ''), 300),
    '((?<=^|: |[(]|HTTP |status |answered )[1-5][0-9]{2}|'
        || '(?<=[1-5][0-9]{2}[ -])[245]\.[0-9]{1,3}\.[0-9]{1,3})(?=$|[ :,;-])',
    chr(57344) || '\1', 'g'),
    '<?[^[:space:]<>(),;:"'']+@[^[:space:]<>(),;:"'']+>?', '<address>', 'g'),
    '(?<![[:alnum:].]|":|": )"[^"]*"(?!:)|(?<![[:alnum:]])''[^'']*''|“[^”]*”|„[^“]*“|«[^»]*»', '"…"', 'g'),
    '\+?(?<![[:alnum:]_.-]|' || chr(57344) || ')(?:[0-9][0-9 ()/.-]{6,}[0-9]|[[:alpha:]_.-]*[0-9][[:alnum:]_.-]*(?:,[0-9]{3}[[:alnum:].]*)*)',
    '…', 'g'),
    chr(57344), '')

-- part: matching
-- Whether an enrollment e is selected, by the fields of a Selection; NULL restricts nothing. LIKE comes
-- first, because the regular expressions of the cause are slow.
($1::bigint[] IS NULL OR e.id = ANY ($1)) AND ($2::text IS NULL OR e.subject = $2)
   AND ($3::text IS NULL OR e.sequence = $3) AND ($4::text IS NULL OR e.step = $4)
   AND ($5::text IS NULL OR e.failure = $5) AND ($6::text IS NULL OR e.status = $6)
   AND ($7::text IS NULL OR e.subject >= $7 AND e.subject < $7 || chr(1114111)
        OR e.id = ANY ($16::bigint[]))
   AND ($8::text[] IS NULL OR e.sequence = ANY ($8))
   AND ($9::timestamptz IS NULL OR e.wake_at >= $9) AND ($10::timestamptz IS NULL OR e.wake_at < $10)
   AND ($11::timestamptz IS NULL OR coalesce(e.entered_at, e.created_at) < $11)
   AND ($12::timestamptz IS NULL OR e.ended_at IS NULL OR e.ended_at <= $12)
   AND ($13::text[] IS NULL OR e.data #>> $13 = $14)
   AND ($15::text[] IS NULL OR e.status = 'failed' AND coalesce(e.last_error, '') LIKE ANY ($17)
        AND {cause} = ANY ($15))

-- part: selection
-- The enrollments that an operator selects. Planned for its arguments, so that each filter finds its
-- index.
  FROM sequencer.enrollments AS e
 WHERE {matching}
   AND e.status = ANY ($18::text[]) AND ($19::text IS NULL OR e.step <> $19)

-- name: select
-- Find the selected enrollments, in no order: a million would be sorted on disk.
SELECT id
{selection};

-- name: outcomes
-- Count enrollments that were retried or moved by their present status, and those that failed after a time
-- by cause.
SELECT g.*, x.data, x.subject
  FROM (SELECT e.status, e.ended_at > $2 AS is_after, CASE WHEN e.status = 'failed' THEN {cause} END AS cause,
               count(*) AS enrollments, max(e.id) AS example
          FROM sequencer.enrollments AS e WHERE e.id = ANY ($1::bigint[])
         GROUP BY 1, 2, 3 ORDER BY 4 DESC LIMIT 100) AS g
  JOIN sequencer.enrollments AS x ON x.id = g.example ORDER BY g.enrollments DESC;

-- name: steps_of_all
-- Read the names of the steps that all these sequences have.
SELECT name FROM sequencer.steps WHERE sequence = ANY ($1::text[])
 GROUP BY name HAVING count(*) = cardinality($1) ORDER BY min(position), name;

-- name: selected
-- Count the selected enrollments by sequence, step, status and failure.
SELECT sequence, step, status, failure, count(*)
{selection}
 GROUP BY sequence, step, status, failure ORDER BY sequence, step, status, failure;

-- name: with_step
-- Find which of the sequences have a step of this name.
SELECT sequence FROM sequencer.steps WHERE name = $1 AND sequence = ANY ($2::text[]);

-- name: set_reason
-- Make the statement that sets the reason for the events of a transaction. It is a SET LOCAL, which Citus
-- sends to its nodes, unlike a call of set_config.
SELECT format('SET LOCAL sequencer.reason = %L', $1::text);

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
-- Set the status of sequences; return the former one.
WITH before AS (
    SELECT name, status FROM sequencer.sequences WHERE name = ANY ($1::text[])
     ORDER BY name FOR UPDATE
), changed AS (
    UPDATE sequencer.sequences AS s SET status = $2
      FROM before WHERE s.name = before.name AND before.status <> $2
)
SELECT name, status AS before FROM before;

-- name: count_active
-- Count the active enrollments of sequences.
SELECT name, (SELECT count(*) FROM sequencer.enrollments AS e
               WHERE e.sequence = name AND e.status = 'active') AS active
  FROM unnest($1::text[]) AS s (name);
