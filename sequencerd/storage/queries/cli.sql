-- Statements of the command line.

-- name: without_jit
-- Do not compile the statements of this transaction: that takes longer than counting a million rows.
SET LOCAL jit = off;

-- name: status
-- Read the counts of each step, for one sequence or all.
SELECT sequence, step, type, status, active, due, overdue, next_wake_at, failed, rescheduling, problem
  FROM sequencer.overview WHERE $1::text IS NULL OR sequence = $1;

-- name: definition_digests
-- Read a digest of each definition, without the status, to compare the shards.
SELECT q.name, md5((r.document - 'status')::text) AS digest
  FROM sequencer.sequences AS q
 CROSS JOIN LATERAL (SELECT document FROM sequencer.revisions WHERE sequence = q.name
                      ORDER BY revision DESC LIMIT 1) AS r
 WHERE $1::text IS NULL OR q.name = $1;

-- name: quoted_user
-- Read the name of the present user, as in SQL.
SELECT quote_ident(current_user);

-- name: has_role
-- Check whether there is no such role yet, or the present user has it.
SELECT to_regrole($1) IS NULL OR pg_has_role(to_regrole($1), 'USAGE');

-- name: description
-- Read the description of a sequence.
SELECT description FROM sequencer.sequences WHERE name = $1;

-- name: known_sequences
-- Read the names of all sequences.
SELECT name FROM sequencer.sequences ORDER BY name;

-- name: known_steps
-- Read the names of the steps of a sequence, or of all sequences.
SELECT DISTINCT name FROM sequencer.steps WHERE $1::text IS NULL OR sequence = $1 ORDER BY name;

-- name: has_enrollments
-- Check whether enrollments are in a sequence or at a step, which may have been removed.
SELECT EXISTS (SELECT FROM sequencer.enrollments
                WHERE ($1::text IS NULL OR sequence = $1) AND ($2::text IS NULL OR step = $2));

-- name: has_failures
-- Check whether enrollments have failed with a code, which an application may have written.
SELECT EXISTS (SELECT FROM sequencer.enrollments WHERE status = 'failed' AND failure = $1);

-- name: list
-- Read a page of the enrollments that match the filters of `list`, by id.
SELECT id, sequence, step, subject, status, wake_at,
       CASE WHEN leased_by IS NULL THEN coalesce(waits_until, wake_at) END AS waits_until,
       attempt, failure, last_error
  FROM sequencer.enrollments AS e
 WHERE ($1::text IS NULL OR sequence = $1) AND ($2::text IS NULL OR step = $2)
   AND ($3::text IS NULL OR subject = $3) AND ($4::text IS NULL OR status = $4)
   AND ($5::text IS NULL OR failure = $5)
   AND (NOT $6 OR EXISTS (SELECT FROM sequencer.overdue AS o WHERE o.id = e.id))
   AND id > $7
 ORDER BY id LIMIT $8;

-- part: reported
-- What living daemons report of an active enrollment e, or of the runner of its step s.
LEFT JOIN LATERAL (
      SELECT p.kind, p.since, p.message
        FROM sequencer.problems AS p JOIN sequencer.daemons AS d ON d.name = p.daemon
       WHERE d.alive_until > now() AND e.status = 'active'
         AND (p.kind = 'quarantined' AND p.about = e.id::text OR p.kind = 'runner' AND p.about = s.type)
       ORDER BY p.kind, p.since LIMIT 1) AS r ON true

-- name: show
-- Read one enrollment with its step and its sequence, and what living daemons report of it or of the runner
-- of its step.
SELECT e.id, e.sequence, e.step, e.subject, e.status, e.wake_at, e.entered_at, e.visit, e.attempt,
       e.leased_by, e.goals_met, e.original_id, e.failure, e.last_error, e.created_at, e.ended_at, e.retry_at,
       CASE WHEN isfinite(e.expires_at) THEN e.expires_at END AS expires_at,
       CASE WHEN e.leased_by IS NULL THEN coalesce(e.waits_until, e.wake_at) END AS waits_until,
       coalesce(e.timezone, q.timezone) AS timezone, q.status AS sequence_status,
       (SELECT b.reason FROM sequencer.brakes AS b WHERE b.sequence = e.sequence) AS brake,
       CASE WHEN s.config ? 'topic' THEN s.config->>'topic' ELSE q.topic END AS topic,
       q.time_window, s.type, s.config, s.next_step, s.alt_next_step, s.problem, e.data,
       e.wake_at <= now() AS is_due, r.kind AS reported, r.since AS reported_since,
       r.message AS reported_message
  FROM sequencer.enrollments AS e
  LEFT JOIN sequencer.steps AS s ON s.sequence = e.sequence AND s.name = e.step
  LEFT JOIN sequencer.sequences AS q ON q.name = e.sequence
  {reported}
 WHERE e.id = $1;

-- name: simulated
-- Read an enrollment as a claim does, with its status.
SELECT {whole_enrollment}, e.status
  FROM sequencer.enrollments AS e WHERE e.id = $1;

-- name: history
-- Read all events of an enrollment, in order.
SELECT at, sequence, step, visit, action, message, revision
  FROM sequencer.events WHERE enrollment_id = $1 ORDER BY visit, at;

-- name: events_since
-- Read the events after a time, for `tail`, which reads with some overlap, because rows are not committed in
-- the order of their times.
SELECT v.at, v.enrollment_id, e.subject, v.sequence, v.step, v.visit, v.action, v.message
  FROM sequencer.events AS v LEFT JOIN sequencer.enrollments AS e ON e.id = v.enrollment_id
 WHERE v.at > $1 AND ($2::text IS NULL OR v.sequence = $2)
   AND ($3::bigint IS NULL OR v.enrollment_id = $3)
 ORDER BY v.at, v.enrollment_id;

-- name: enroll
-- Enroll a subject and return the id; nothing where the reentry policy refuses.
INSERT INTO sequencer.enrollments (sequence, subject, data, timezone, step, wake_at)
VALUES ($1, $2, $3::jsonb, $4, $5, coalesce($6::timestamptz, now()))
ON CONFLICT DO NOTHING RETURNING id;

-- name: sample_data
-- Read examples of the data of a sequence: of active enrollments, and of the latest of all.
(SELECT data FROM sequencer.enrollments WHERE sequence = $1 AND status = 'active' LIMIT 1000)
UNION ALL
(SELECT e.data FROM (SELECT sequence, data FROM sequencer.enrollments ORDER BY id DESC LIMIT 20000) AS e
  WHERE e.sequence = $1 LIMIT 1000);

-- name: forget
-- Delete what belongs to a subject, and return the counts.
SELECT enrollments, events, suppressions, redacted, mentioned_in FROM sequencer.forget($1);

-- name: know_texts
-- Let forget and export_subject search in this transaction also for the addresses that other shards have.
SELECT set_config('sequencer.texts', $1, true);

-- name: export_subject
-- Read all data about a subject, as JSON.
SELECT sequencer.export_subject($1)::text;
