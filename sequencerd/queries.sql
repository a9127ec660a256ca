-- Every statement that runs against the database, by name, each with a sentence that says what it does.
-- store.QUERIES has them, with these placeholders expanded:
--
--   {enrollment}        the columns of an enrollment e as the fields of model.Enrollment, in their order,
--                       with NULL for large data
--   {whole_enrollment}  the same with data of any size
--   {small_data}        the data of an enrollment e, NULL where they are large
--   {..._lock}          the numbers of a store.AdvisoryLock

-- name: server_time
-- Read the database's clock, to measure the offset of the daemon's.
SELECT clock_timestamp();

-- name: revisions
-- Read the revision of every sequence, to see which definitions have changed.
SELECT name, revision FROM sequencer.sequences;

-- name: sequences
-- Read the definitions of some sequences, without their steps.
SELECT name, first_step, timezone, status, lookup, recheck, revision
  FROM sequencer.sequences WHERE name = ANY ($1::text[]);

-- name: steps
-- Read the steps of some sequences, in the order of the definitions.
SELECT sequence, name, type, config, next_step, alt_next_step, position, problem, seed,
       retime_from IS NOT NULL AS retime
  FROM sequencer.steps WHERE sequence = ANY ($1::text[]) ORDER BY sequence, position;

-- name: set_problems
-- Set what the daemon found wrong with steps, and clear what it no longer finds.
UPDATE sequencer.steps AS s SET problem = p.problem
  FROM unnest($1::text[], $2::text[], $3::text[]) AS p (sequence, name, problem)
 WHERE s.sequence = p.sequence AND s.name = p.name AND s.problem IS DISTINCT FROM p.problem;

-- name: beat
-- Extend the time until which a daemon is alive, and return when it started. Other daemons are
-- notified if the step types that it serves are new.
WITH before AS (SELECT types FROM sequencer.daemons WHERE name = $1),
     beat AS (
    INSERT INTO sequencer.daemons (name, started_at, alive_until, types)
    VALUES ($1, coalesce($2, now()), now() + $3, $4)
    ON CONFLICT (name) DO UPDATE SET alive_until = excluded.alive_until, types = excluded.types
    RETURNING started_at, types)
SELECT started_at,
       CASE WHEN types IS DISTINCT FROM (SELECT types FROM before)
            THEN pg_notify('sequencer', '{"definitions": true}') END
  FROM beat;

-- name: types_elsewhere
-- Read the step types that other living daemons serve.
SELECT DISTINCT unnest(types) FROM sequencer.daemons WHERE name <> $1 AND alive_until > now();

-- name: notify_due
-- Notify other daemons of steps with due enrollments: the daemon's own writes send no notification.
SELECT pg_notify('sequencer', json_build_object('due', json_build_array(sequence, step))::text)
  FROM unnest($1::text[], $2::text[]) AS p (sequence, step);

-- name: remove_dead_daemons
-- Delete dead daemons with the problems that they reported. Rows that another session has locked are
-- skipped.
DELETE FROM sequencer.daemons WHERE name = ANY (ARRAY(
    SELECT name FROM sequencer.daemons WHERE alive_until < now() FOR UPDATE SKIP LOCKED));

-- name: remove_daemon
-- Delete a daemon that shuts down.
DELETE FROM sequencer.daemons WHERE name = $1;

-- name: remove_problems
-- Delete the problems that a daemon no longer reports.
DELETE FROM sequencer.problems AS p
 WHERE p.daemon = $1
   AND NOT EXISTS (SELECT FROM unnest($2::text[], $3::text[]) AS k (kind, about)
                    WHERE (k.kind, k.about) = (p.kind, p.about));

-- name: write_problems
-- Insert or update the problems that a daemon reports.
INSERT INTO sequencer.problems
       (daemon, kind, about, sequence, step, since, message, waiting)
SELECT $1, * FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
                         $7::text[], $8::bigint[])
ON CONFLICT (daemon, kind, about) DO UPDATE
   SET sequence = excluded.sequence, step = excluded.step, since = excluded.since,
       message = excluded.message, waiting = excluded.waiting;

-- name: reported_problems
-- Read what living daemons report; once where several report the same.
SELECT DISTINCT ON (p.kind, p.about)
       p.kind, p.about, p.sequence, p.step, p.since, p.waiting, p.message, p.daemon
  FROM sequencer.problems AS p JOIN sequencer.daemons AS d ON d.name = p.daemon
 WHERE d.alive_until > now() AND ($1::text IS NULL OR p.sequence = $1 OR p.sequence IS NULL)
 ORDER BY p.kind, p.about, p.since LIMIT $2;

-- name: first_wakes
-- Find the earliest wake time of each step that has active enrollments. It skips from one step to the
-- next in the index, so it costs the same with ten enrollments as with ten million.
WITH RECURSIVE place AS (
    (SELECT sequence, step, wake_at FROM sequencer.enrollments
      WHERE status = 'active' ORDER BY sequence, step, wake_at LIMIT 1)
    UNION ALL
    SELECT following.* FROM place CROSS JOIN LATERAL (
        SELECT sequence, step, wake_at FROM sequencer.enrollments AS e
         WHERE e.status = 'active' AND (e.sequence, e.step) > (place.sequence, place.step)
         ORDER BY sequence, step, wake_at LIMIT 1) AS following
)
SELECT sequence, step, wake_at FROM place WHERE wake_at < 'infinity';

-- name: take_bell
-- Try to acquire the notify lock, which makes triggers notify. True: this session holds it. False:
-- another daemon does, which is as good. Null: transactions are in progress that have sent no
-- notification.
SELECT CASE WHEN pg_try_advisory_lock({notify_lock}) THEN true
            WHEN EXISTS (SELECT FROM pg_locks
                          WHERE locktype = 'advisory' AND (classid, objid) = ({notify_lock})
                            AND database = (SELECT oid FROM pg_database
                                             WHERE datname = current_database())
                            AND mode = 'ExclusiveLock' AND granted) THEN false END;

-- name: leave_bell
-- Release the notify lock and notify the other daemons of it.
SELECT pg_advisory_unlock({notify_lock}), pg_notify('sequencer', '{"quiet": true}');

-- name: count_due
-- Count the enrollments that are due at steps, and those overdue by more than a minute. The limit
-- applies to each step, so that a backlog of millions is not counted through.
SELECT p.sequence, p.step, d.due, d.overdue
  FROM unnest($1::text[], $2::text[]) AS p (sequence, step)
 CROSS JOIN LATERAL (
    SELECT count(*) AS due,
           count(*) FILTER (WHERE wake_at < $3::timestamptz - interval '1 minute') AS overdue
      FROM (SELECT e.wake_at FROM sequencer.enrollments AS e
             WHERE e.sequence = p.sequence AND e.step = p.step AND e.status = 'active'
               AND e.wake_at <= $3
             ORDER BY e.wake_at LIMIT $4) AS first) AS d
 WHERE d.due > 0;

-- name: claim
-- Claim due enrollments of one step, the oldest first. None if the definition is not the known revision;
-- none that a living daemon has leased, even if a lock kept that daemon from extending the lease. Large
-- data are read separately.
SELECT {enrollment}
  FROM sequencer.enrollments AS e
 WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active' AND e.wake_at <= $3
   AND EXISTS (SELECT FROM sequencer.sequences AS s
                WHERE s.name = $1 AND s.revision = $4 AND s.status <> 'paused')
   AND (e.leased_by IS NULL OR e.leased_by <> $6 AND NOT EXISTS (
        SELECT FROM sequencer.daemons AS d WHERE d.name = e.leased_by AND d.alive_until > $3))
   AND e.id <> ALL ($7::bigint[])
 ORDER BY e.wake_at LIMIT $5
   FOR UPDATE OF e SKIP LOCKED;

-- name: refusals
-- Check whether sequences admit enrollments that jump into them, as they would an insert, and return
-- their reentry policies.
SELECT j.id, j.sequence, q.reentry,
       CASE WHEN q.status = 'archived' THEN 'archived'
            WHEN q.reentry <> 'always' AND EXISTS (
                SELECT FROM sequencer.enrollments AS e
                 WHERE e.subject = j.subject AND e.sequence = j.sequence AND e.entry = 0
                   AND e.id <> j.id) THEN 'already_enrolled' END AS refusal
  FROM unnest($1::bigint[], $2::text[], $3::text[]) AS j (id, subject, sequence)
  JOIN sequencer.sequences AS q ON q.name = j.sequence;

-- name: refusing
-- Find the sequences that would refuse a jump of one enrollment, as its subject is enrolled there.
SELECT DISTINCT sequence FROM sequencer.enrollments
 WHERE subject = $1 AND entry = 0 AND id <> $2;

-- name: due_ids
-- Find the enrollments that `claim` would find, without a lock and without reading values that may be
-- unreadable.
SELECT e.id
  FROM sequencer.enrollments AS e
 WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active' AND e.wake_at <= $3
   AND (e.leased_by IS NULL OR e.leased_by <> $5 AND NOT EXISTS (
        SELECT FROM sequencer.daemons AS d WHERE d.name = e.leased_by AND d.alive_until > $3))
   AND e.id <> ALL ($6::bigint[])
 ORDER BY e.wake_at LIMIT $4;

-- name: expired_ids
-- Find due enrollments of a step that cannot be claimed: those that have expired, and of those due since
-- a given time, those whose expiry is unknown.
SELECT e.id
  FROM ((SELECT id, leased_by FROM sequencer.enrollments
          WHERE sequence = $1 AND step = $2 AND status = 'active'
            AND expires_at IS NOT NULL AND expires_at <= $3 AND id <> ALL ($6::bigint[])
          ORDER BY expires_at LIMIT $4)
        UNION ALL
        (SELECT id, leased_by FROM sequencer.enrollments
          WHERE sequence = $1 AND step = $2 AND status = 'active' AND wake_at <= $3
            AND wake_at >= $7 AND expires_at IS NULL AND id <> ALL ($6::bigint[])
          ORDER BY wake_at LIMIT $4)) AS e
 WHERE e.leased_by IS NULL OR e.leased_by <> $5 AND NOT EXISTS (
        SELECT FROM sequencer.daemons AS d WHERE d.name = e.leased_by AND d.alive_until > $3)
 LIMIT $4;

-- name: forget_expiries
-- Mark the expiry of a step's enrollments as unknown: -infinity has passed, so they are evaluated again.
UPDATE sequencer.enrollments SET expires_at = '-infinity'
 WHERE sequence = $1 AND step = $2 AND status = 'active' AND expires_at IS NOT NULL
   AND leased_by IS NULL;

-- name: claim_some
-- Claim given enrollments of a step that are due or waiting, including those that this daemon itself has
-- leased.
SELECT {enrollment}
  FROM sequencer.enrollments AS e
 WHERE e.id = ANY ($1::bigint[]) AND e.sequence = $2 AND e.step = $3 AND e.status = 'active'
   AND (e.wake_at <= $4 OR e.leased_by IS NULL AND e.entered_at IS NOT NULL)
   AND EXISTS (SELECT FROM sequencer.sequences AS s
                WHERE s.name = $2 AND s.revision = $5 AND s.status <> 'paused')
   AND (e.leased_by IS NULL OR e.leased_by = $6 OR NOT EXISTS (
        SELECT FROM sequencer.daemons AS d WHERE d.name = e.leased_by AND d.alive_until > $4))
 ORDER BY e.wake_at
   FOR UPDATE OF e SKIP LOCKED;

-- name: claim_bare
-- Claim like `claim_some`, but without the values that applications write, which the database may be
-- unable to read.
SELECT e.id, '' AS subject, '{}' AS data, e.created_at, e.tag, $2 AS sequence, $3 AS step,
       NULL AS timezone, least(e.wake_at, '9999-12-31Z') AS wake_at, e.entered_at, e.visit,
       e.attempt, e.retry_at, e.leased_by, NULL AS last_error, '{}'::text[] AS goals_met,
       NULL AS goals_elsewhere, '{}'::text[] AS executed
  FROM sequencer.enrollments AS e
 WHERE e.id = ANY ($1::bigint[]) AND e.sequence = $2::text AND e.step = $3::text
   AND e.status = 'active'
   AND (e.wake_at <= $4 OR e.leased_by IS NULL AND e.entered_at IS NOT NULL)
   AND EXISTS (SELECT FROM sequencer.sequences AS s
                WHERE s.name = $2 AND s.revision = $5 AND s.status <> 'paused')
   AND (e.leased_by IS NULL OR e.leased_by = $6 OR NOT EXISTS (
        SELECT FROM sequencer.daemons AS d WHERE d.name = e.leased_by AND d.alive_until > $4))
 ORDER BY e.wake_at
   FOR UPDATE OF e SKIP LOCKED;

-- name: large_data
-- Read the data that claims and locks omit because of their size.
SELECT id, data FROM sequencer.enrollments WHERE id = ANY ($1::bigint[]);

-- name: count_lapses
-- Count the leases that expired within the last day, in the present visits of enrollments.
SELECT v.enrollment_id, count(*)
  FROM unnest($1::bigint[], $2::int[]) AS e (id, visit)
  JOIN sequencer.events AS v ON v.enrollment_id = e.id AND v.visit = e.visit
 WHERE v.action = 'lapsed' AND v.at > $3::timestamptz - interval '1 day'
 GROUP BY v.enrollment_id;

-- name: orphans
-- Find enrollments that a daemon has leased but does not know of, among the first due at steps.
SELECT o.sequence, o.step, o.id
  FROM unnest($1::text[], $2::text[]) AS p (sequence, step)
 CROSS JOIN LATERAL (
    SELECT e.id, e.sequence, e.step, e.leased_by FROM sequencer.enrollments AS e
     WHERE e.sequence = p.sequence AND e.step = p.step AND e.status = 'active' AND e.wake_at <= $3
     ORDER BY e.wake_at LIMIT 1000) AS o
 WHERE o.leased_by = $4 AND o.id <> ALL ($5::bigint[]);

-- name: probe
-- Check that enrollments and events can be written at all; it writes none.
WITH nothing AS (
    UPDATE sequencer.enrollments
       SET sequence = sequence, step = step, status = status, wake_at = wake_at,
           entered_at = entered_at, visit = visit, attempt = attempt, retry_at = retry_at,
           goals_met = goals_met, goals_elsewhere = goals_elsewhere, executed = executed,
           expires_at = expires_at,
           leased_by = leased_by, failure = failure, last_error = last_error,
           ended_at = ended_at, data = data
     WHERE false
    RETURNING id, sequence, step, visit
)
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message, revision)
SELECT id, now(), sequence, step, visit, 'warning', NULL, NULL FROM nothing;

-- name: next_wake
-- Find when to claim at the step again. The remaining due rows are locked by another session, and tried
-- again soon, or leased by another daemon, and tried again when that may be dead. Enrollments that this
-- daemon has leased or quarantined are not counted.
SELECT least(
    (SELECT e.wake_at FROM sequencer.enrollments AS e
      WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active'
        AND e.wake_at > $3 AND e.wake_at < 'infinity'
      ORDER BY e.wake_at LIMIT 1),
    (SELECT CASE WHEN e.leased_by IS NULL THEN e.wake_at
                 ELSE greatest(e.wake_at, d.alive_until) END
       FROM sequencer.enrollments AS e LEFT JOIN sequencer.daemons AS d ON d.name = e.leased_by
      WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active' AND e.wake_at <= $3
        AND e.leased_by IS DISTINCT FROM $4 AND e.id <> ALL ($5::bigint[])
      ORDER BY 1 LIMIT 1));

-- name: lock
-- Lock enrollments whose side effects have ended, and read what may have changed meanwhile. Enrollments
-- that another session has locked are skipped.
SELECT e.id, e.visit, e.attempt, e.leased_by, e.subject,
       {small_data},
       e.sequence, e.step, e.timezone, e.last_error, e.goals_met, e.goals_elsewhere, e.executed,
       (SELECT q.revision FROM sequencer.sequences AS q WHERE q.name = e.sequence)
  FROM sequencer.enrollments AS e
 WHERE e.id = ANY ($1::bigint[])
 ORDER BY e.id
   FOR UPDATE OF e SKIP LOCKED;

-- name: fences
-- Read the fences of enrollments. It waits for their locks, and so for a transaction whose outcome is
-- unknown.
SELECT e.id, e.visit, e.attempt, e.leased_by
  FROM sequencer.enrollments AS e
 WHERE e.id = ANY ($1::bigint[])
 ORDER BY e.id
   FOR UPDATE OF e;

-- name: existing
-- Find which enrollments still exist: a locked row is not a deleted one.
SELECT id FROM sequencer.enrollments WHERE id = ANY ($1::bigint[]);

-- name: write
-- Write the new state of all enrollments that have the same, as most of a batch do.
UPDATE sequencer.enrollments
   SET sequence = $2, step = $3, status = $4,
       wake_at = CASE WHEN $5::timestamptz >= '9999-01-01Z' THEN 'infinity' ELSE $5 END,
       entered_at = $6, visit = $7, attempt = $8, retry_at = $9, leased_by = $10, failure = $11,
       last_error = $12, executed = $13, expires_at = $14,
       ended_at = CASE WHEN $4 = 'active' THEN NULL ELSE $15::timestamptz END
 WHERE id = ANY ($1::bigint[]);

-- name: record
-- Insert events. Most events of a batch are the same but for the enrollment, so each is sent once.
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message, revision)
SELECT who.id, what.at, what.sequence, what.step, what.visit, what.action, what.message,
       what.revision
  FROM unnest($1::bigint[], $2::int[]) AS who (id, number)
  JOIN unnest($3::timestamptz[], $4::text[], $5::text[], $6::int[], $7::text[], $8::text[],
              $9::int[]) WITH ORDINALITY
       AS what (at, sequence, step, visit, action, message, revision, number)
    ON what.number = who.number;

-- name: write_goals
-- Write the goals that one enrollment has met, in its sequence and in those that it has left.
UPDATE sequencer.enrollments SET goals_met = $2, goals_elsewhere = $3 WHERE id = $1;

-- name: merge_data
-- Merge the result of a side effect into an enrollment's data.
UPDATE sequencer.enrollments SET data = data || $2 WHERE id = $1;

-- name: extend_leases
-- Extend the leases of everything that this daemon is executing.
UPDATE sequencer.enrollments AS e SET wake_at = $3
  FROM (SELECT id FROM sequencer.enrollments
         WHERE id = ANY ($1::bigint[]) AND leased_by = $2 AND status = 'active'
         ORDER BY id FOR UPDATE SKIP LOCKED) AS mine
 WHERE e.id = mine.id;

-- name: occupied
-- Find each step that has active enrollments, skipping from one to the next in the index.
WITH RECURSIVE place AS (
    (SELECT sequence, step FROM sequencer.enrollments
      WHERE status = 'active' ORDER BY sequence, step LIMIT 1)
    UNION ALL
    SELECT following.* FROM place CROSS JOIN LATERAL (
        SELECT sequence, step FROM sequencer.enrollments AS e
         WHERE e.status = 'active' AND (e.sequence, e.step) > (place.sequence, place.step)
         ORDER BY sequence, step LIMIT 1) AS following
)
SELECT sequence, step FROM place;

-- name: request_evaluation
-- Request that all enrollments waiting at steps are evaluated: from the first id on, or once more after
-- a pass that has begun. Steps that another session has locked are skipped, so that no deadlock is
-- possible.
UPDATE sequencer.steps AS s
   SET retime_from = coalesce(s.retime_from, 0), retime_again = coalesce(s.retime_from > 0, false)
  FROM (SELECT t.sequence, t.name FROM sequencer.steps AS t
          JOIN unnest($1::text[], $2::text[]) AS p (sequence, name)
            ON p.sequence = t.sequence AND p.name = t.name
           FOR NO KEY UPDATE OF t SKIP LOCKED) AS free
 WHERE s.sequence = free.sequence AND s.name = free.name
RETURNING s.sequence, s.name;

-- name: waiting_of_subjects
-- Read the waiting enrollments of some subjects, by id.
SELECT id, subject, sequence, step FROM sequencer.enrollments
 WHERE subject = ANY ($1::text[]) AND id > $2 AND status = 'active' AND wake_at > $3
   AND leased_by IS NULL AND entered_at IS NOT NULL
 ORDER BY id LIMIT $4;

-- name: unfinished_retiming
-- Read the steps whose waiting enrollments have yet to be evaluated, and from which id on.
SELECT sequence, name, retime_from FROM sequencer.steps WHERE retime_from IS NOT NULL;

-- name: take_lead
-- Try to acquire the lock of the one daemon that handles the requests that applications send by NOTIFY.
SELECT pg_try_advisory_lock({requests_lock});

-- name: retiming_from
-- Read from which id on the enrollments waiting at a step have yet to be evaluated.
SELECT retime_from FROM sequencer.steps WHERE sequence = $1 AND name = $2;

-- name: standing
-- Read the ids of the active enrollments at a step, in an order that changed wake times leave as it is.
SELECT id FROM sequencer.enrollments
 WHERE sequence = $1 AND step = $2 AND status = 'active' AND id >= $3 ORDER BY id LIMIT $4;

-- name: take_retiming
-- Lock a step until the end of the transaction, so that this daemon alone evaluates what waits there. A
-- step that another daemon has locked is skipped.
SELECT true FROM sequencer.steps
 WHERE sequence = $1 AND name = $2 AND retime_from = $3
   AND EXISTS (SELECT FROM sequencer.sequences WHERE name = $1 AND revision = $4)
   FOR NO KEY UPDATE SKIP LOCKED;

-- name: note_retiming
-- Record up to which id a step is done, in the transaction that evaluated them.
UPDATE sequencer.steps SET retime_from = $3 WHERE sequence = $1 AND name = $2;

-- name: lock_waiting
-- Lock and read enrollments that wait at a changed step. Due ones are evaluated under the change anyway.
SELECT {enrollment}
  FROM sequencer.enrollments AS e
 WHERE e.sequence = $1 AND e.step = $2 AND e.id = ANY ($3::bigint[]) AND e.status = 'active'
   AND e.wake_at > $4 AND e.leased_by IS NULL AND e.entered_at IS NOT NULL
 ORDER BY e.id
   FOR UPDATE OF e SKIP LOCKED;

-- name: waiting
-- Find the enrollments that `lock_waiting` would lock, without a lock.
SELECT e.id FROM sequencer.enrollments AS e
 WHERE e.sequence = $1 AND e.step = $2 AND e.id = ANY ($3::bigint[]) AND e.status = 'active'
   AND e.wake_at > $4 AND e.leased_by IS NULL AND e.entered_at IS NOT NULL
 ORDER BY e.id;

-- name: retimed
-- Record that a step is done, unless a request arrived meanwhile; return whether one did.
UPDATE sequencer.steps AS s
   SET retime_from = CASE WHEN s.retime_again THEN 0 END, retime_again = false
 WHERE sequence = $1 AND name = $2 AND retime_from = $3
RETURNING retime_from IS NOT NULL AS again;

-- name: new_transaction
-- Draw a transaction number. The xmax of a snapshot would not do: transactions in progress may have
-- greater numbers than that.
SELECT pg_current_xact_id()::text::bigint;

-- name: oldest_transaction
-- Read the number of the oldest transaction that is still in progress.
SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint;

-- name: revive
-- Resume enrollments that failed because their step was invalid, now that it is valid.
WITH revived AS (
    UPDATE sequencer.enrollments AS e
       SET status = 'active', wake_at = $3, ended_at = NULL, failure = NULL, last_error = NULL,
           attempt = 0, retry_at = NULL, leased_by = NULL, executed = '{}'
      FROM unnest($1::text[], $2::text[]) AS mended (sequence, step)
     WHERE e.sequence = mended.sequence AND e.step = mended.step
       AND e.status = 'failed' AND e.failure = 'invalid_step'
    RETURNING e.id, e.sequence, e.step, e.visit
)
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)
SELECT id, $3, sequence, step, visit, 'resumed', 'the step has been mended' FROM revived;

-- name: limit_statement
-- Limit the statements of this transaction to so many milliseconds.
SELECT set_config('statement_timeout', $1, true);

-- name: look_up
-- Call an SQL function for the external data of subjects. Its name is validated before it is put in.
SELECT l.subject, l.data FROM "{schema}"."{name}"($1::text[]) AS l (subject, data);

-- name: add_event_partitions
-- Create the partitions of the history that are needed soon.
SELECT sequencer.add_event_partitions();

-- name: drop_event_partition
-- Drop the oldest partition of the history that ended before a time, and return its name.
SELECT sequencer.drop_event_partition($1);

-- name: delete_ended
-- Delete a batch of the enrollments that ended before a time, and return how many.
SELECT sequencer.delete_ended($1, $2);

-- name: try_lock_retention
-- Try to acquire the lock of the one daemon that runs retention, until the end of the transaction.
SELECT pg_try_advisory_xact_lock({retention_lock});

-- name: status
-- Read the counts of each step, for one sequence or all.
SELECT sequence, step, type, status, active, due, overdue, next_wake_at, failed, retiming, problem
  FROM sequencer.overview WHERE $1::text IS NULL OR sequence = $1;

-- name: known_sequences
-- What a command can name.
SELECT name FROM sequencer.sequences ORDER BY name;

-- name: known_steps
-- The steps of a sequence, or of all.
SELECT DISTINCT name FROM sequencer.steps WHERE $1::text IS NULL OR sequence = $1 ORDER BY name;

-- name: has_enrollments
-- Whether enrollments are in a sequence or at a step: those of a removed one can be named as well.
SELECT EXISTS (SELECT FROM sequencer.enrollments
                WHERE ($1::text IS NULL OR sequence = $1) AND ($2::text IS NULL OR step = $2));

-- name: list
-- Read a page of the enrollments that match the filters of `list`, by id.
SELECT id, sequence, step, subject, status, wake_at, attempt, failure, last_error
  FROM sequencer.enrollments AS e
 WHERE ($1::text IS NULL OR sequence = $1) AND ($2::text IS NULL OR step = $2)
   AND ($3::text IS NULL OR subject = $3) AND ($4::text IS NULL OR status = $4)
   AND ($5::text IS NULL OR failure = $5)
   AND (NOT $6 OR EXISTS (SELECT FROM sequencer.overdue AS o WHERE o.id = e.id))
   AND id > $7
 ORDER BY id LIMIT $8;

-- name: select
-- Find the enrollments that an operator selects. Plan it for its arguments, so that each filter finds
-- its index.
SELECT id FROM sequencer.enrollments
 WHERE ($1::bigint[] IS NULL OR id = ANY ($1)) AND ($2::text IS NULL OR subject = $2)
   AND ($3::text IS NULL OR sequence = $3) AND ($4::text IS NULL OR step = $4)
   AND ($5::text IS NULL OR failure = $5)
   AND status = ANY ($6::text[]) AND ($7::text IS NULL OR step <> $7)
 ORDER BY id;

-- name: selected
-- Count selected enrollments by sequence, step, status and failure.
SELECT sequence, step, status, failure, count(*)
  FROM sequencer.enrollments WHERE id = ANY ($1::bigint[])
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

-- name: show
-- Read one enrollment with its step and its sequence.
SELECT e.id, e.sequence, e.step, e.subject, e.status, e.wake_at, e.entered_at, e.visit, e.attempt,
       e.leased_by, e.goals_met, e.failure, e.last_error, e.created_at, e.ended_at, e.retry_at,
       CASE WHEN isfinite(e.expires_at) THEN e.expires_at END AS expires_at,
       coalesce(e.timezone, q.timezone) AS timezone, q.status AS sequence_status,
       s.type, s.config, s.next_step, s.alt_next_step, s.problem, e.data
  FROM sequencer.enrollments AS e
  LEFT JOIN sequencer.steps AS s ON s.sequence = e.sequence AND s.name = e.step
  LEFT JOIN sequencer.sequences AS q ON q.name = e.sequence
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
-- Read the events after a time, for `tail`, which reads with some overlap: rows are committed in
-- another order than they are made.
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

-- name: apply_sequence
-- Insert or update a sequence. Not by ON CONFLICT, whose refused insert would draw a revision.
WITH changed AS (
    UPDATE sequencer.sequences
       SET first_step = $2, timezone = $3, status = $4, reentry = $5, lookup = $6, recheck = $7
     WHERE name = $1 AND (first_step, timezone, status, reentry, lookup, recheck)
                         IS DISTINCT FROM ($2, $3, $4, $5, $6, $7)
)
INSERT INTO sequencer.sequences (name, first_step, timezone, status, reentry, lookup, recheck)
SELECT $1::text, $2::text, $3::text, $4::text, $5::text, $6::text, $7::interval
 WHERE NOT EXISTS (SELECT FROM sequencer.sequences WHERE name = $1);

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

-- name: rename_step
-- Rename a step. Triggers update its enrollments and what leads to it.
UPDATE sequencer.steps SET name = $3 WHERE sequence = $1 AND name = $2;

-- name: move_people
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
-- sequences by SQL wait.
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

-- name: people
-- Read all active enrollments at a step that have begun.
SELECT {whole_enrollment}
  FROM sequencer.enrollments AS e
 WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active' AND e.entered_at IS NOT NULL;

-- name: archive
-- Archive sequences.
UPDATE sequencer.sequences SET status = 'archived' WHERE name = ANY ($1::text[]);

-- name: mark_from_file
-- Record that sequences were applied from a file.
UPDATE sequencer.sequences SET from_file = true WHERE name = ANY ($1::text[]) AND NOT from_file;

-- name: revisions_of
-- Read the revisions of a sequence, the latest first, each with the document before it.
SELECT revision, at, by, document, lag(document) OVER (ORDER BY revision) AS before
  FROM sequencer.revisions WHERE sequence = $1 ORDER BY revision DESC;

-- name: document
-- Read the document of a sequence, as it is or as it was in a revision.
SELECT CASE
    WHEN $2::integer IS NULL THEN sequencer.document($1)
    WHEN $2 <= greatest((SELECT revision FROM sequencer.sequences WHERE name = $1),
                        (SELECT max(revision) FROM sequencer.revisions WHERE sequence = $1))
    THEN (SELECT document FROM sequencer.revisions WHERE sequence = $1 AND revision <= $2
           ORDER BY revision DESC LIMIT 1) END;

-- name: suppressed
-- Find which addresses are suppressed.
SELECT channel, address FROM sequencer.suppressions
 WHERE (channel, address) IN (SELECT * FROM unnest($1::text[], $2::text[]));

-- name: lock_migrations
-- Acquire the migration lock until the end of the transaction: processes migrate one at a time.
SELECT pg_advisory_xact_lock({migrations_lock});

-- name: create_migrations
-- Create the schema and the table of applied migrations.
CREATE SCHEMA IF NOT EXISTS sequencer;
CREATE TABLE IF NOT EXISTS sequencer.migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: has_migrations
-- Check whether the table of applied migrations exists.
SELECT to_regclass('sequencer.migrations') IS NOT NULL;

-- name: migrations
-- Read the applied migrations.
SELECT version, name, checksum FROM sequencer.migrations ORDER BY version;

-- name: record_migration
-- Record an applied migration.
INSERT INTO sequencer.migrations (version, name, checksum) VALUES ($1, $2, $3);

-- name: server_version
-- Read the server's version as a number.
SELECT current_setting('server_version_num')::integer;

-- name: server_encoding
-- Read the encoding of the database.
SELECT current_setting('server_encoding');

-- name: server_facts
-- Read what `doctor` checks about the server and the session.
SELECT current_setting('server_version') AS version, pg_is_in_recovery() AS is_standby,
       pg_backend_pid() AS pid, current_setting('transaction_read_only') = 'on' AS is_read_only,
       current_setting('idle_session_timeout')::interval AS idle_timeout;

-- name: present_triggers
-- Read the triggers of the schema, and whether they are enabled.
SELECT c.relname::text AS "table", t.tgname::text AS name, t.tgenabled IN ('O', 'A') AS fires
  FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
 WHERE c.relnamespace = 'sequencer'::regnamespace AND NOT t.tgisinternal AND t.tgparentid = 0;

-- name: missing_roles
-- Find which of the roles do not exist.
SELECT name FROM unnest($1::text[]) AS name WHERE to_regrole(name) IS NULL;

-- name: missing_grants
-- Find the privileges that the role of daemons has and the present user lacks.
WITH granted (object, privilege, has) AS MATERIALIZED (
    SELECT c.oid::regclass::text, a.privilege_type,
           CASE c.relkind WHEN 'S' THEN has_sequence_privilege(c.oid, a.privilege_type)
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

-- name: row_security
-- Find the tables where row-level security may hide rows from the present user, or from the owner, with
-- whose rights triggers and functions run; and whether it hides all rows, as no policy permits any.
WITH users (oid, is_owner) AS (
    SELECT oid, false FROM pg_roles WHERE rolname = current_user
    UNION ALL
    SELECT nspowner, true FROM pg_namespace WHERE nspname = 'sequencer'
), policies AS (
    SELECT u.oid AS "user", p.polrelid AS "table", p.polpermissive AS permits,
           p.polcmd = '*' AND pg_get_expr(p.polqual, p.polrelid) = 'true'
           AND coalesce(pg_get_expr(p.polwithcheck, p.polrelid), 'true') = 'true' AS is_all
      FROM pg_policy AS p CROSS JOIN users AS u
     WHERE EXISTS (SELECT FROM unnest(p.polroles) AS role
                    WHERE CASE role WHEN 0 THEN true ELSE pg_has_role(u.oid, role, 'USAGE') END)
)
SELECT c.oid::regclass::text AS "table", u.oid::regrole::text AS "user",
       NOT EXISTS (SELECT FROM policies AS p
                    WHERE p."table" = c.oid AND p."user" = u.oid AND p.permits) AS hides_all
  FROM pg_class AS c CROSS JOIN users AS u JOIN pg_roles AS r ON r.oid = u.oid
 WHERE c.relnamespace = 'sequencer'::regnamespace AND c.relrowsecurity
   AND NOT r.rolsuper AND NOT r.rolbypassrls
   AND (c.relforcerowsecurity OR NOT pg_has_role(u.oid, c.relowner, 'USAGE'))
   AND NOT (EXISTS (SELECT FROM policies AS p WHERE p."table" = c.oid AND p."user" = u.oid
                       AND p.permits AND p.is_all)
            AND NOT EXISTS (SELECT FROM policies AS p WHERE p."table" = c.oid AND p."user" = u.oid
                               AND NOT p.permits AND NOT p.is_all))
   AND NOT (u.is_owner AND EXISTS (SELECT FROM users WHERE NOT is_owner AND oid = u.oid))
 ORDER BY u.is_owner, c.oid::regclass::text;

-- name: is_superuser
-- Check whether the present user is a superuser.
SELECT rolsuper FROM pg_roles WHERE rolname = current_user;

-- name: notify
-- Send an empty notification, to test that notifications arrive.
SELECT pg_notify($1, '');

-- name: count_daemons
-- Count the daemons that listen for notifications.
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'sequencerd listener';

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
SELECT format('replication slot %s, which nobody reads', slot_name), NULL
  FROM pg_replication_slots WHERE NOT active AND (xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
 ORDER BY age DESC NULLS LAST;

-- name: count_overdue
-- Count the overdue enrollments, and find the longest delay.
SELECT count(*), max(overdue_by) AS longest FROM sequencer.overdue;

-- name: failed_by_code
-- Count the failed enrollments by failure code.
SELECT failure, count(*) FROM sequencer.enrollments
 WHERE status = 'failed' GROUP BY failure ORDER BY count(*) DESC;

-- name: problems
-- Read the steps that cannot be executed, and why.
SELECT sequence, name AS step, problem FROM sequencer.steps
 WHERE problem IS NOT NULL ORDER BY sequence, position;

-- name: partition_facts
-- Check whether the history has a partition for this month, and rows outside of all partitions.
SELECT to_regclass(format('sequencer.events_%s', to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')))
       IS NOT NULL AS has_month,
       EXISTS (SELECT FROM sequencer.events_other) AS has_others;

-- name: types_in_use
-- Read the step types that definitions use.
SELECT DISTINCT type FROM sequencer.steps;

-- name: lookups_in_use
-- Read the lookups that sequences name, and whether each is an SQL function.
SELECT DISTINCT lookup AS name, to_regprocedure(lookup || '(text[])') IS NOT NULL AS is_function
  FROM sequencer.sequences WHERE lookup IS NOT NULL;

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

-- name: console_sequences
-- Read all sequences for the console.
SELECT name, status, timezone, first_step, revision FROM sequencer.sequences ORDER BY name;

-- name: console_steps
-- Count the active enrollments of each step, those due within the hour, and those overdue. It reads only
-- the index of due enrollments, and of each step at most the limit.
SELECT s.sequence, s.name AS step, s.type, s.next_step, s.alt_next_step, s.config, s.problem,
       a.active, a.soon, a.overdue
  FROM sequencer.steps AS s CROSS JOIN LATERAL (
    SELECT count(*) AS active,
           count(*) FILTER (WHERE wake_at BETWEEN $1::timestamptz - interval '1 minute'
                                              AND $1 + interval '1 hour') AS soon,
           count(*) FILTER (WHERE wake_at < $1 - interval '1 minute') AS overdue
      FROM (SELECT e.wake_at FROM sequencer.enrollments AS e
             WHERE e.sequence = s.sequence AND e.step = s.name AND e.status = 'active'
             ORDER BY e.wake_at LIMIT $2) AS first) AS a
 ORDER BY s.sequence, s.position;

-- name: console_failed
-- Count the failed enrollments by step and failure, with an example of each; at most the limit are
-- counted.
SELECT g.sequence, g.step, g.failure, g.failed, x.last_error, x.data
  FROM (SELECT sequence, step, failure, count(*) AS failed
          FROM (SELECT sequence, step, failure FROM sequencer.enrollments WHERE status = 'failed'
                 ORDER BY sequence, step, failure LIMIT $1) AS first
         GROUP BY sequence, step, failure) AS g
  LEFT JOIN LATERAL (
    SELECT e.last_error, e.data FROM sequencer.enrollments AS e
     WHERE e.status = 'failed' AND e.sequence = g.sequence AND e.step = g.step
       AND e.failure = g.failure LIMIT 1) AS x ON true
 ORDER BY g.sequence, g.step, g.failure;

-- name: console_flow
-- Count the events at steps between two times, by day.
SELECT date_trunc('day', at AT TIME ZONE 'UTC')::date AS day, sequence, step, action,
       count(*) AS times
  FROM sequencer.events
 WHERE at >= $1 AND at < $2
   AND action IN ('enrolled', 'next', 'altNext', 'goal', 'jump', 'completed', 'failed')
 GROUP BY 1, 2, 3, 4;

-- name: console_stays
-- Measure the length of visits that ended between two times, in seconds: of one enrollment in so many,
-- and at most the limit.
SELECT v.sequence, v.step, extract(epoch FROM v.at - (
           SELECT max(p.at) FROM sequencer.events AS p
            WHERE p.enrollment_id = v.enrollment_id AND p.at <= v.at
              AND (p.visit < v.visit OR p.action = 'enrolled')))::float8 AS seconds
  FROM (SELECT * FROM sequencer.events
         WHERE at >= $1 AND at < $2 AND action IN ('next', 'altNext', 'goal', 'jump')
           AND abs(hashint8(enrollment_id)::bigint) % $3 = 0 LIMIT $4) AS v;

-- name: console_people
-- Read a page of the active enrollments at a step, by wake time. Many may have the same wake time, so a
-- page begins at an offset within it.
SELECT id, subject, status, wake_at, entered_at, attempt, last_error, data
  FROM sequencer.enrollments
 WHERE sequence = $1 AND step = $2 AND status = 'active' AND wake_at >= $3
 ORDER BY wake_at LIMIT $5 OFFSET $4;

-- name: console_failed_people
-- Read a page of the enrollments that failed at a step with one failure code.
SELECT id, subject, status, ended_at, attempt, last_error, data
  FROM sequencer.enrollments
 WHERE sequence = $1 AND step = $2 AND ($3::text IS NULL AND failure IS NULL OR failure = $3)
   AND status = 'failed'
 LIMIT $5 OFFSET $4;

-- name: console_history
-- Read the latest events of an enrollment before a time.
SELECT at, sequence, step, visit, action, message, revision
  FROM sequencer.events WHERE enrollment_id = $1 AND at < $2 ORDER BY at DESC, visit DESC LIMIT $3;

-- name: console_versions
-- Build a version for each enrollment that differs after any change to it.
SELECT e.id, concat_ws('-', e.xmin, e.ctid, extract(epoch FROM (
           SELECT max(v.at) FROM sequencer.events AS v WHERE v.enrollment_id = e.id)),
           (SELECT q.revision FROM sequencer.sequences AS q WHERE q.name = e.sequence)) AS version
  FROM sequencer.enrollments AS e WHERE e.id = ANY ($1::bigint[]);

-- name: console_by_subject
-- Read enrollments in a range of subjects, in order, after a given one.
SELECT id, subject, sequence, step, status, wake_at, failure, last_error, data, entry
  FROM sequencer.enrollments
 WHERE subject >= $1 AND subject < $2 AND (subject, sequence, entry) > ($3, $4, $5)
 ORDER BY subject, sequence, entry LIMIT $6;

-- name: console_by_id
-- Read the latest enrollments with an id below the given one.
SELECT id, subject, sequence, step, status, wake_at, failure, last_error, data, entry
  FROM sequencer.enrollments WHERE id < $1 ORDER BY id DESC LIMIT $2;

-- name: console_has_email_index
-- Check whether the index of e-mail addresses exists and is valid.
SELECT EXISTS (SELECT FROM pg_index
                WHERE indexrelid = to_regclass('sequencer.enrollments_email') AND indisvalid);

-- name: console_by_email
-- Find enrollments by e-mail address, by an index.
SELECT id, subject, sequence, step, status, wake_at, failure, last_error, data, entry
  FROM sequencer.enrollments WHERE lower(data->>'email') = lower($1) LIMIT $2;

-- name: console_by_email_of_latest
-- Find enrollments by e-mail address among the latest, where there is no index.
SELECT id, subject, sequence, step, status, wake_at, failure, last_error, data, entry
  FROM (SELECT * FROM sequencer.enrollments ORDER BY id DESC LIMIT $3) AS latest
 WHERE lower(data->>'email') = lower($1) LIMIT $2;

-- name: console_revisions
-- Read a page of the revisions of a sequence, the latest first, each with the document before it.
SELECT r.revision, r.at, r.by, r.document,
       (SELECT b.document FROM sequencer.revisions AS b
         WHERE b.sequence = r.sequence AND b.revision < r.revision
         ORDER BY b.revision DESC LIMIT 1) AS before
  FROM sequencer.revisions AS r
 WHERE r.sequence = $1 AND r.revision < $2 ORDER BY r.revision DESC LIMIT $3;

-- name: console_log_out
-- End a session for all daemons, and delete the logouts of sessions that have expired since.
WITH over AS (DELETE FROM sequencer.console_logouts WHERE until < now())
INSERT INTO sequencer.console_logouts (session, until) VALUES ($1, now() + $2)
ON CONFLICT (session) DO NOTHING;

-- name: console_is_logged_out
-- Check whether a session was ended by a logout, here or at another daemon.
SELECT EXISTS (SELECT FROM sequencer.console_logouts WHERE session = $1);
