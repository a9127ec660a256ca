-- Statements of the engine: claims, writes, leases, definitions, rescheduling, retention.
-- Python's datetime has no infinity: the year 9999 is returned instead.

-- name: is_standby
-- Check whether the server is a standby, which cannot be written to.
SELECT pg_is_in_recovery();

-- name: is_read_only
-- Check whether nothing can be written: to a standby, or where transactions are read-only by default.
SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean;

-- part: on_citus
-- Citus has distributed the tables: it then has a trigger on each. Its own tables cannot be named, as
-- they exist only there.
EXISTS (SELECT FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
         WHERE t.tgrelid = to_regclass('sequencer.enrollments') AND p.proname = 'citus_truncate_trigger')

-- name: is_on_citus
-- Check whether Citus has distributed the tables, so that triggers on its nodes cannot notify.
SELECT {on_citus};

-- name: prepare_session
-- Begin transactions with the isolation that claims need: with others, statements that skip locked rows fail
-- beside each other. Have the server end a transaction whose daemon has frozen, or whose machine is gone, so
-- that others can lock its rows.
SELECT set_config('default_transaction_isolation', 'read committed', false),
       set_config('idle_in_transaction_session_timeout', '30s', false);

-- name: check_client
-- Have the server check regularly during a statement that its client is still connected.
SELECT set_config('client_connection_check_interval', '5s', false);

-- name: allow_long_transaction
-- Let this transaction take as long as it likes. PostgreSQL 16 has no limit for whole transactions.
SELECT set_config('idle_in_transaction_session_timeout', '0', true),
       CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
            THEN set_config('transaction_timeout', '0', true) END;

-- name: server_time
-- Read the database's clock, to measure the offset of the daemon's.
SELECT clock_timestamp();

-- name: server_identity
-- Identify the tables and the present run of the server: of a database that was restored meanwhile, or of
-- another server, the same revision may be another definition.
SELECT pg_postmaster_start_time()::text, 'sequencer.sequences'::regclass::oid;

-- name: revisions
-- Read the revision of every sequence, to see which definitions have changed.
SELECT name, revision FROM sequencer.sequences;

-- name: some_revisions
-- Read the revisions of some sequences, to see whether their definitions have changed.
SELECT name, revision FROM sequencer.sequences WHERE name = ANY ($1::text[]);

-- part: holidays_by_calendar
-- All holidays, as {calendar: [day, ...]}.
(SELECT coalesce(jsonb_object_agg(calendar, days), '{}')
   FROM (SELECT calendar, jsonb_agg(day) AS days FROM sequencer.holidays GROUP BY calendar) AS h)

-- part: limits_by_topic
-- The limits of all topics, as {topic: limit}, each written as a string.
(SELECT coalesce(jsonb_object_agg(name, frequency_limit::text), '{}')
   FROM sequencer.topics WHERE frequency_limit IS NOT NULL)

-- name: sequences
-- Read the definitions of some sequences, without their steps, and the holidays and limits that they
-- may need.
SELECT name, first_step, timezone, status, lookup, recheck, revision, time_window, topic, locale,
       partials, resumed_at,
       CASE WHEN brake_at_most IS NULL THEN apply_brake_until ELSE '9999-12-31Z' END AS braked_until,
       EXISTS (SELECT FROM sequencer.brakes AS b WHERE b.sequence = q.name AND b.reason IS NOT NULL)
           AS is_stopped,
       CASE WHEN time_window ? 'holidays' OR EXISTS (
                SELECT FROM sequencer.steps
                 WHERE sequence = q.name AND config @? '$.**.holidays')
            THEN {holidays_by_calendar} ELSE '{}' END AS holidays,
       {limits_by_topic} AS topic_limits
  FROM sequencer.sequences AS q WHERE name = ANY ($1::text[]);

-- name: steps
-- Read the steps of some sequences, in the order of the definitions.
SELECT sequence, name, type, config, next_step, alt_next_step, position, problem, seed,
       reschedule_from IS NOT NULL AS reschedule
  FROM sequencer.steps WHERE sequence = ANY ($1::text[]) ORDER BY sequence, position;

-- name: set_problems
-- Set the problems that the daemon has found in steps, and clear those that are over.
UPDATE sequencer.steps AS s SET problem = p.problem
  FROM unnest($1::text[], $2::text[], $3::text[]) AS p (sequence, name, problem)
 WHERE s.sequence = p.sequence AND s.name = p.name AND s.problem IS DISTINCT FROM p.problem;

-- name: beat
-- Extend the time until which a daemon is alive, and return when it started. Other daemons are notified if
-- the step types that it serves are new. If this daemon was considered dead, whatever delayed its heartbeat
-- may also have delayed those of others: their time is extended as well, unless they are writing it just now.
-- A time that no lease can reach was written when the server's clock was ahead; a dead daemon would be alive
-- until then.
WITH before AS (SELECT types, alive_until FROM sequencer.daemons WHERE name = $1),
     beat AS (
    INSERT INTO sequencer.daemons (name, started_at, alive_until, types)
    VALUES ($1, coalesce($2, now()), now() + $3, $4)
    ON CONFLICT (name) DO UPDATE SET alive_until = excluded.alive_until, types = excluded.types
    RETURNING started_at, types),
     others AS (
    UPDATE sequencer.daemons SET alive_until = now() + $3
     WHERE name = ANY (ARRAY(
               SELECT d.name FROM sequencer.daemons AS d, before, beat
                WHERE d.name <> $1
                  AND (before.alive_until < now() AND d.alive_until < now() + $3
                       OR d.alive_until > now() + interval '1 day')
                  FOR UPDATE OF d SKIP LOCKED)))
SELECT started_at,
       CASE WHEN types IS DISTINCT FROM (SELECT types FROM before)
            THEN pg_notify('sequencer', '{"definitions": true}') END
  FROM beat;

-- name: types_elsewhere
-- Read the step types that other living daemons serve.
SELECT DISTINCT unnest(types) FROM sequencer.daemons WHERE name <> $1 AND alive_until > now();

-- name: notify_due
-- Notify other daemons of steps with enrollments that are due since a time: the daemon's own writes send
-- no notification.
SELECT pg_notify('sequencer', json_build_object(
           'due', json_build_array(sequence, step), 'since', $3::timestamptz)::text)
  FROM unnest($1::text[], $2::text[]) AS p (sequence, step);

-- name: remove_dead_daemons
-- Delete dead daemons with the problems that they reported. Rows that another session has locked are
-- skipped. None is deleted if the daemon $1 itself counts as dead, as when the clock was set forward: its next
-- heartbeat extends the time of the others.
DELETE FROM sequencer.daemons WHERE name = ANY (ARRAY(
    SELECT d.name FROM sequencer.daemons AS d
     WHERE d.alive_until < now()
       AND EXISTS (SELECT FROM sequencer.daemons WHERE name = $1 AND alive_until > now())
       FOR UPDATE OF d SKIP LOCKED));

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

-- name: first_wakes
-- Find the earliest wake time of each step that has active enrollments. It skips from one step to the
-- next in the index, so it costs the same with ten enrollments as with ten million. At the steps $1, $2
-- it begins at the times $3. Their neighbours ($4, $5 and $6, $7) are the gaps between those steps.
SELECT k.sequence, k.step, k.wake_at
  FROM unnest($4::text[], $5::text[], $6::text[], $7::text[])
       AS gap (after_sequence, after_step, before_sequence, before_step)
 CROSS JOIN LATERAL (
    WITH RECURSIVE step_key AS (
        (SELECT e.sequence, e.step, e.wake_at FROM sequencer.enrollments AS e
          WHERE e.status = 'active' AND (e.sequence, e.step) > (gap.after_sequence, gap.after_step)
            AND (e.sequence, e.step) < (gap.before_sequence, gap.before_step)
          ORDER BY e.sequence, e.step, e.wake_at LIMIT 1)
        UNION ALL
        SELECT following.* FROM step_key CROSS JOIN LATERAL (
            SELECT e.sequence, e.step, e.wake_at FROM sequencer.enrollments AS e
             WHERE e.status = 'active' AND (e.sequence, e.step) > (step_key.sequence, step_key.step)
               AND (e.sequence, e.step) < (gap.before_sequence, gap.before_step)
             ORDER BY e.sequence, e.step, e.wake_at LIMIT 1) AS following
    )
    SELECT sequence, step, wake_at FROM step_key WHERE wake_at < 'infinity') AS k
UNION ALL
SELECT p.sequence, p.step, first.wake_at
  FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS p (sequence, step, since)
 CROSS JOIN LATERAL (
    SELECT e.wake_at FROM sequencer.enrollments AS e
     WHERE e.sequence = p.sequence AND e.step = p.step AND e.status = 'active'
       AND e.wake_at >= p.since AND e.wake_at < 'infinity'
     ORDER BY e.wake_at LIMIT 1) AS first;

-- name: occupied_steps
-- Find the next $3 steps after the step $1, $2 that have active enrollments, and the earliest wake time of
-- each, as above; null if only a change can wake them. Without gaps, it takes less time.
WITH RECURSIVE step_key AS (
    (SELECT e.sequence, e.step, e.wake_at FROM sequencer.enrollments AS e
      WHERE e.status = 'active' AND (e.sequence, e.step) > ($1, $2)
      ORDER BY e.sequence, e.step, e.wake_at LIMIT 1)
    UNION ALL
    SELECT following.* FROM step_key CROSS JOIN LATERAL (
        SELECT e.sequence, e.step, e.wake_at FROM sequencer.enrollments AS e
         WHERE e.status = 'active' AND (e.sequence, e.step) > (step_key.sequence, step_key.step)
         ORDER BY e.sequence, e.step, e.wake_at LIMIT 1) AS following
)
SELECT sequence, step, nullif(wake_at, 'infinity') AS wake_at FROM step_key LIMIT $3;

-- name: acquire_notify_lock
-- Try to acquire the notify lock, which makes triggers notify. True: this session holds it. False: another
-- daemon does, which is just as good. Null: transactions are in progress that have skipped their
-- notification.
SELECT CASE WHEN pg_try_advisory_lock({notify_lock}) THEN true
            WHEN EXISTS (SELECT FROM pg_locks
                          WHERE locktype = 'advisory' AND (classid, objid) = ({notify_lock})
                            AND database = (SELECT oid FROM pg_database
                                             WHERE datname = current_database())
                            AND mode = 'ExclusiveLock' AND granted) THEN false END;

-- name: release_notify_lock
-- Release the notify lock and notify the other daemons of it.
SELECT pg_advisory_unlock({notify_lock}), pg_notify('sequencer', '{"notifications": "off"}');

-- name: count_due
-- Count the enrollments that are due at steps since given times, and those overdue by more than a minute. The
-- limit applies to each step, so that a backlog of millions is not counted in full.
SELECT p.sequence, p.step, d.due, d.overdue
  FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS p (sequence, step, since)
 CROSS JOIN LATERAL (
    SELECT count(*) AS due,
           count(*) FILTER (WHERE wake_at < $4::timestamptz - interval '1 minute') AS overdue
      FROM (SELECT e.wake_at FROM sequencer.enrollments AS e
             WHERE e.sequence = p.sequence AND e.step = p.step AND e.status = 'active'
               AND e.wake_at >= p.since AND e.wake_at <= $4
             ORDER BY e.wake_at LIMIT $5) AS first) AS d
 WHERE d.due > 0;

-- part: is_active
-- Whether an enrollment is active, in statements that find it by its id or subject. `status = 'active'` is the
-- same, but lets the planner read the index of all active ones instead, where it has no statistics or old ones.
wake_at IS NOT NULL

-- part: is_free
-- No living daemon has leased the enrollment, as of $3, and neither has the daemon $4, which knows what it
-- executes. The server's clock, by which heartbeats are written, may have been set back since $3. A daemon
-- that cannot write its own heartbeat considers no other dead.
(e.leased_by IS NULL OR e.leased_by <> $4 AND NOT EXISTS (
        SELECT FROM sequencer.daemons AS d
         WHERE d.name = e.leased_by AND d.alive_until > least($3, now()))
    AND EXISTS (SELECT FROM sequencer.daemons AS d WHERE d.name = $4 AND d.alive_until > now()))

-- part: is_current
-- The revision $6 of the sequence $1 is the present one, and the sequence is not paused.
EXISTS (SELECT FROM sequencer.sequences AS s
                WHERE s.name = $1 AND s.revision = $6 AND s.status <> 'paused')

-- part: is_given
-- The enrollment is one of $5 at a step, due or waiting, and free or leased to the daemon itself.
e.id = ANY ($5::bigint[]) AND e.sequence = $1::text AND e.step = $2::text AND {is_active}
   AND (e.wake_at <= $3 OR e.leased_by IS NULL AND e.entered_at IS NOT NULL)
   AND {is_current}
   AND (e.leased_by = $4 OR {is_free})

-- part: transaction
-- The number of this transaction. None with Citus, where each node has numbers of its own.
CASE WHEN to_regclass('pg_catalog.pg_dist_shard') IS NULL THEN pg_current_xact_id()::text::bigint END

-- part: has_triggers_of_others
-- Triggers of others may change what is written. Citus cannot execute this subquery without a column.
EXISTS (SELECT 1 FROM pg_trigger AS t JOIN pg_proc AS f ON f.oid = t.tgfoid
         WHERE t.tgrelid = 'sequencer.enrollments'::regclass AND NOT t.tgisinternal
           AND f.pronamespace <> 'sequencer'::regnamespace)

-- part: number_unless_changed
-- The number of this transaction, or NULL where triggers of others may change what it writes.
CASE WHEN NOT {has_triggers_of_others} THEN {transaction} END

-- part: due_since
-- The due enrollments of one step from a time on: see engine/cursors.py. None if the definition is not the
-- known revision.
FROM sequencer.enrollments AS e
 WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active' AND e.wake_at BETWEEN $8 AND $3
   AND {is_current} AND e.id <> ALL ($5::bigint[])

-- name: claim
-- Claim due enrollments of steps ($1, $2), of each the oldest since $8 and at most $7: none that a living
-- daemon has leased, even if a lock kept that daemon from extending the lease. Large data are read
-- separately. Nothing moves the rows from their places while they are locked.
SELECT (SELECT {number_unless_changed}) AS transaction, e.*
  FROM unnest($1::text[], $2::text[], $6::bigint[], $7::int[], $8::timestamptz[])
       AS w (sequence, step, revision, most, since)
  JOIN sequencer.sequences AS s
    ON s.name = w.sequence AND s.revision = w.revision AND s.status <> 'paused'
 CROSS JOIN LATERAL (
    SELECT e.ctid::text AS place, {enrollment}
      FROM sequencer.enrollments AS e
     WHERE e.sequence = w.sequence AND e.step = w.step AND e.status = 'active'
       AND e.wake_at BETWEEN w.since AND $3 AND e.id <> ALL ($5::bigint[]) AND {is_free}
     ORDER BY e.wake_at LIMIT w.most
       FOR UPDATE OF e SKIP LOCKED) AS e;

-- name: peek
-- Read due enrollments without a lock, also those that other daemons have leased, and which transactions have
-- written them: with Citus, whose nodes have numbers of their own, none is known. It also returns the clock
-- and, if wanted, when the next one wakes, so that no separate check of what is left is needed.
SELECT now(), CASE WHEN $9::boolean THEN
         (SELECT e.wake_at FROM sequencer.enrollments AS e
         WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active'
           AND e.wake_at > $3 AND e.wake_at < 'infinity'
         ORDER BY e.wake_at LIMIT 1) END,
       CASE WHEN to_regclass('pg_catalog.pg_dist_shard') IS NULL THEN e.xmin::text END AS version,
       {enrollment}
  {due_since} AND e.leased_by IS DISTINCT FROM $4
 ORDER BY e.wake_at LIMIT $7;

-- name: refusals
-- Check whether sequences admit subjects as they would an insert, and return their reentry policies and
-- revisions, in the order asked. An enrollment that jumps into a sequence does not count as being there.
SELECT q.reentry, q.revision,
       CASE WHEN q.status = 'archived' THEN 'archived'
            WHEN q.reentry <> 'always' AND EXISTS (
                SELECT FROM sequencer.enrollments AS e
                 WHERE e.subject = j.subject AND e.sequence = j.sequence AND e.entry = 0
                   AND e.id IS DISTINCT FROM j.id
                   AND NOT (q.reentry = 'after' AND e.status <> 'active' AND sequencer.reentry_time(
                                e.ended_at, q.reentry_after, q.timezone) <= now()))
            THEN 'already_enrolled' END AS refusal
  FROM unnest($1::bigint[], $2::text[], $3::text[])
       WITH ORDINALITY AS j (id, subject, sequence, number)
  LEFT JOIN sequencer.sequences AS q ON q.name = j.sequence
 ORDER BY j.number;

-- name: lock_cancelled
-- Lock the active enrollments of subjects in sequences, except for the enrollments that cancel them. Those
-- that another session has locked are returned as NULL.
WITH wanted AS MATERIALIZED (
    SELECT j.number, e.id
      FROM unnest($1::bigint[], $2::text[], $3::text[])
           WITH ORDINALITY AS j (id, subject, sequence, number)
      JOIN sequencer.enrollments AS e ON e.subject = j.subject AND e.sequence = j.sequence
     WHERE {is_active} AND e.id <> j.id
), locked AS MATERIALIZED (
    SELECT e.id FROM sequencer.enrollments AS e
     WHERE e.id IN (SELECT id FROM wanted) ORDER BY e.id FOR UPDATE OF e SKIP LOCKED
)
SELECT wanted.number, locked.id AS locked FROM wanted LEFT JOIN locked ON locked.id = wanted.id;

-- name: cancel_others
-- Cancel locked enrollments, and record which enrollment has cancelled them.
WITH cancelled AS (
    UPDATE sequencer.enrollments AS e
       SET status = 'cancelled', wake_at = NULL, ended_at = $3, leased_by = NULL, retry_at = NULL,
           expires_at = NULL, waits_until = NULL
      FROM unnest($1::bigint[], $2::text[]) AS c (id, message)
     WHERE e.id = c.id AND {is_active}
    RETURNING e.id, e.sequence, e.step, e.visit, e.entered_at, c.message
)
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message, seconds_at_step)
SELECT id, $3, sequence, step, visit, 'cancelled', message, extract(epoch FROM $3 - entered_at)
  FROM cancelled;

-- name: limit_waits
-- Wait for locks only briefly in this transaction. It has locked enrollments, and waits for a transaction that
-- has enrolled the same subject: if that waits for the enrollments, a deadlock would end one of the two, which
-- PostgreSQL looks for after a second.
SET LOCAL lock_timeout = '200ms';

-- name: enter
-- Enroll the subjects of Enroll steps, and return where each begins.
SELECT sequence, step
  FROM sequencer.enroll_all($1::text[], $2::text[], $3::jsonb[], $4::text[], $5::jsonb[]);

-- name: due_ids
-- Find the enrollments that `claim` would find, without a lock and without reading values that may be
-- unreadable.
SELECT e.id
  {due_since} AND {is_free}
 ORDER BY e.wake_at LIMIT $7;

-- name: expired_ids
-- Find due enrollments of a step that cannot be claimed: those that have expired, and of those due since
-- a given time, those whose expiry is unknown. However many are leased, others are found.
SELECT id
  FROM ((SELECT e.id FROM sequencer.enrollments AS e
          WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active'
            AND e.expires_at IS NOT NULL AND e.expires_at <= $3 AND e.id <> ALL ($5::bigint[]) AND {is_free}
          ORDER BY e.expires_at LIMIT $6)
        UNION ALL
        (SELECT e.id FROM sequencer.enrollments AS e
          WHERE e.sequence = $1 AND e.step = $2 AND e.status = 'active' AND e.wake_at <= $3
            AND e.wake_at >= $7 AND e.expires_at IS NULL AND e.id <> ALL ($5::bigint[]) AND {is_free}
          ORDER BY e.wake_at LIMIT $6)) AS found
 LIMIT $6;

-- name: forget_expiries
-- Mark the expiry of a batch of a step's enrollments as unknown: -infinity has passed, so they are evaluated
-- again. Those that another session has locked are skipped, so that no deadlock is possible.
UPDATE sequencer.enrollments SET expires_at = '-infinity'
 WHERE id = ANY (ARRAY(
    SELECT id FROM sequencer.enrollments
     WHERE sequence = $1 AND step = $2 AND status = 'active' AND expires_at > '-infinity'
       AND leased_by IS NULL
     LIMIT $3 FOR UPDATE SKIP LOCKED));

-- name: claim_some
-- Claim given enrollments of a step that are due or waiting, including those that this daemon itself has
-- leased.
SELECT {enrollment}
  FROM sequencer.enrollments AS e
 WHERE {is_given}
 ORDER BY e.wake_at
   FOR UPDATE OF e SKIP LOCKED;

-- name: claim_bare
-- Claim like `claim_some`, but without the values that applications write, which the database may be
-- unable to read.
SELECT {bare_enrollment}
  FROM sequencer.enrollments AS e
 WHERE {is_given}
 ORDER BY e.wake_at
   FOR UPDATE OF e SKIP LOCKED;

-- name: large_data
-- Read the data that claims and locks omit because of their size.
SELECT id, data FROM sequencer.enrollments WHERE id = ANY ($1::bigint[]);

-- name: count_expired_leases
-- Count the leases that expired within the last day, in the present visits of enrollments. As a lateral
-- subquery, it reads an index even where there are no statistics yet.
SELECT e.id AS enrollment_id, expired.count
  FROM unnest($1::bigint[], $2::int[]) AS e (id, visit)
 CROSS JOIN LATERAL (
    SELECT count(*) FROM sequencer.events AS v
     WHERE v.enrollment_id = e.id AND v.visit = e.visit AND v.action = 'lease_expired'
       AND v.at > $3::timestamptz - interval '1 day') AS expired
 WHERE expired.count > 0;

-- name: orphans
-- Find enrollments that a daemon has leased but does not know of, among the first due at steps.
SELECT o.sequence, o.step, o.id
  FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS p (sequence, step, since)
 CROSS JOIN LATERAL (
    SELECT e.id, e.sequence, e.step, e.leased_by FROM sequencer.enrollments AS e
     WHERE e.sequence = p.sequence AND e.step = p.step AND e.status = 'active'
       AND e.wake_at >= p.since AND e.wake_at <= $4
     ORDER BY e.wake_at LIMIT 1000) AS o
 WHERE o.leased_by = $5 AND o.id <> ALL ($6::bigint[]);

-- name: probe
-- Check that enrollments and events can be written at all; it writes none.
WITH nothing AS (
    UPDATE sequencer.enrollments
       SET sequence = sequence, step = step, status = status, wake_at = wake_at,
           entered_at = entered_at, visit = visit, attempt = attempt, leases = leases,
           retry_at = retry_at,
           goals_met = goals_met, goals_elsewhere = goals_elsewhere, executed = executed,
           expires_at = expires_at,
           leased_by = leased_by, failure = failure, last_error = last_error,
           ended_at = ended_at, data = data
     WHERE id < '-9223372036854775808' -- none; Citus cannot plan `false`
    RETURNING id, sequence, step, visit
)
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message, revision)
SELECT id, now(), sequence, step, visit, 'warning', NULL, NULL FROM nothing;

-- name: left
-- Find what claims have left at steps ($1, $2) from the times $6 on: the first due row, when to claim again,
-- and, if wanted, when the next one wakes; and read the clock. Due rows that are left are locked by another
-- session, and tried again soon, or leased by another daemon, and tried again when that may be dead.
-- Enrollments that this daemon has leased or quarantined are not counted.
SELECT w.sequence, w.step, now() AS now, due.wake_at, due.again_at,
       CASE WHEN w.with_ahead THEN
         (SELECT e.wake_at FROM sequencer.enrollments AS e
           WHERE e.sequence = w.sequence AND e.step = w.step AND e.status = 'active'
             AND e.wake_at > $3 AND e.wake_at < 'infinity'
           ORDER BY e.wake_at LIMIT 1) END AS ahead
  FROM unnest($1::text[], $2::text[], $6::timestamptz[], $7::boolean[])
       AS w (sequence, step, since, with_ahead)
 CROSS JOIN LATERAL (
    SELECT min(f.wake_at) AS wake_at,
           min(CASE WHEN f.leased_by IS NULL THEN f.wake_at
                    ELSE greatest(f.wake_at, d.alive_until) END) AS again_at
      FROM (SELECT e.wake_at, e.leased_by FROM sequencer.enrollments AS e
             WHERE e.sequence = w.sequence AND e.step = w.step AND e.status = 'active'
               AND e.wake_at BETWEEN w.since AND $3
               AND e.leased_by IS DISTINCT FROM $4 AND e.id <> ALL ($5::bigint[])
             ORDER BY e.wake_at LIMIT 1000) AS f
      LEFT JOIN sequencer.daemons AS d ON d.name = f.leased_by) AS due;

-- name: lock
-- Lock enrollments whose side effects have ended, and read what may have changed meanwhile. Enrollments
-- that another session has locked are skipped.
SELECT e.id, e.visit, e.leases, e.leased_by, e.subject,
       {small_data},
       e.sequence, e.step, {timezone}, e.last_error, e.goals_met, e.goals_elsewhere, e.executed,
       (SELECT q.revision FROM sequencer.sequences AS q WHERE q.name = e.sequence)
  FROM sequencer.enrollments AS e
 WHERE e.id = ANY ($1::text::bigint[])
 ORDER BY e.id
   FOR UPDATE OF e SKIP LOCKED;

-- name: lock_unchanged
-- Lock those enrollments of one sequence that are still as a transaction of this daemon has written them, with
-- this lease, and return their ids and places, the revision of the sequence, and the number of this transaction. None
-- where triggers of others may have changed what was written, or will change it.
SELECT coalesce(array_agg(e.id), '{}') AS ids, coalesce(array_agg(e.place), '{}') AS places,
       (SELECT q.revision FROM sequencer.sequences AS q WHERE q.name = $3) AS revision,
       {number_unless_changed} AS transaction
  FROM (SELECT e.id, e.ctid::text AS place FROM sequencer.enrollments AS e
         WHERE e.id = ANY ($1::text::bigint[]) AND e.xmin = $2::text::xid
           AND e.leased_by = $4 AND e.leases = $5
           AND NOT {has_triggers_of_others}
         ORDER BY e.id FOR UPDATE OF e SKIP LOCKED) AS e;

-- name: fences
-- Read the fences of enrollments. It waits for their locks, and so for a transaction whose outcome is
-- unknown.
SELECT e.id, e.visit, e.leases, e.leased_by
  FROM sequencer.enrollments AS e
 WHERE e.id = ANY ($1::bigint[])
 ORDER BY e.id
   FOR UPDATE OF e;

-- name: is_any_free
-- Check whether one of some enrollments can be locked.
SELECT true FROM sequencer.enrollments WHERE id = ANY ($1::bigint[]) LIMIT 1 FOR UPDATE SKIP LOCKED;

-- name: present_fences
-- Read the fences of enrollments, whether or not they are locked.
SELECT e.id, e.visit, e.leases, e.leased_by
  FROM sequencer.enrollments AS e
 WHERE e.id = ANY ($1::bigint[]);

-- name: existing
-- Find which enrollments still exist: a locked row is not a deleted one.
SELECT id FROM sequencer.enrollments WHERE id = ANY ($1::bigint[]);

-- part: happened
-- Events: most of a batch differ only in the enrollment, so each is sent once. The planner expects ten rows
-- on each side; FULL JOIN keeps it from choosing a nested loop.
SELECT enrollment.id, what.at, what.sequence, what.step, what.visit, what.action, what.message,
       what.revision, what.seconds_at_step
  FROM unnest($18::text::bigint[], $19::text::int[]) AS enrollment (id, number)
  FULL JOIN unnest($20::timestamptz[], $21::text[], $22::text[], $23::int[], $24::text[], $25::text[],
              $26::int[], $27::real[]) WITH ORDINALITY
       AS what (at, sequence, step, visit, action, message, revision, seconds_at_step, number)
    ON what.number = enrollment.number

-- part: event
-- The columns of an event.
(enrollment_id, at, sequence, step, visit, action, message, revision, seconds_at_step)

-- part: write_state
-- Write the new state of enrollments that all get the same one, as most of a batch do.
UPDATE sequencer.enrollments
   SET sequence = $2, step = $3, status = $4,
       wake_at = CASE WHEN $5::timestamptz >= '9999-01-01Z' THEN 'infinity' ELSE $5 END,
       entered_at = $6, visit = $7, attempt = $8, leases = $9, retry_at = $10, leased_by = $11,
       failure = $12, last_error = $13, executed = (SELECT $14::text::text[]),
       expires_at = $15,
       waits_until = CASE WHEN $16::timestamptz >= '9999-01-01Z' THEN 'infinity' ELSE $16 END,
       ended_at = CASE WHEN $4 = 'active' THEN NULL ELSE $17::timestamptz END

-- part: is_stored
-- Whether a row is stored as `write_state` has set it. A user's trigger may change what is written, but must
-- not leave the row due as before, because the same would then happen to it again and again.
(status <> 'active' OR visit = $7 AND leases = $9 AND leased_by IS NOT DISTINCT FROM $11
 AND (wake_at > $17::timestamptz OR wake_at = $5::timestamptz))

-- name: write_and_record
-- Write the new state of enrollments that all get the same one, and insert events. Return how many are stored
-- as they were written. Arrays of ids are sent as text, because asyncpg takes four times as long to encode a
-- list.
WITH written AS (
    {write_state} WHERE id = ANY ($1::text::bigint[]) RETURNING {is_stored} AS is_stored
), recorded AS (
    INSERT INTO sequencer.events {event}
    {happened}
)
SELECT count(*) FILTER (WHERE is_stored) FROM written;

-- name: write_in_place
-- Write and insert like `write_and_record`, but find the rows, which this transaction has locked, by their
-- places instead of their ids. Return how many are stored as they were written: a row that a trigger has
-- written since it was locked is at another place.
WITH written AS (
    {write_state} WHERE ctid = ANY ($1::text::tid[]) RETURNING {is_stored} AS is_stored
), recorded AS (
    INSERT INTO sequencer.events {event}
    {happened}
)
SELECT count(*) FILTER (WHERE is_stored) FROM written;

-- part: states
-- Write the new states of enrollments, each its own. The ids are sent as text, which hides their number from
-- the planner: it would read the whole table to join so many.
UPDATE sequencer.enrollments AS e
   SET sequence = state.sequence, step = state.step, status = state.status,
       wake_at = CASE WHEN state.wake_at >= '9999-01-01Z' THEN 'infinity' ELSE state.wake_at END,
       entered_at = state.entered_at, visit = state.visit, attempt = state.attempt,
       leases = state.leases, retry_at = state.retry_at, leased_by = state.leased_by,
       failure = state.failure, last_error = state.last_error, executed = state.effects,
       expires_at = state.expires_at,
       waits_until = CASE WHEN state.waits_until >= '9999-01-01Z' THEN 'infinity'
                          ELSE state.waits_until END,
       ended_at = CASE WHEN state.status = 'active' THEN NULL ELSE $17::timestamptz END
  FROM (SELECT *, executed::text[] AS effects -- Citus lets no UPDATE convert a column
          FROM unnest($1::text::bigint[], $2::text[], $3::text[], $4::text[], $5::timestamptz[],
                      $6::timestamptz[], $7::int[], $8::int[], $9::int[], $10::timestamptz[], $11::text[],
                      $12::text[], $13::text[], $14::text[], $15::timestamptz[], $16::timestamptz[])
               AS each (id, sequence, step, status, wake_at, entered_at, visit, attempt, leases, retry_at,
                        leased_by, failure, last_error, executed, expires_at, waits_until)) AS state
 WHERE e.id = state.id

-- part: each_is_stored
-- Whether a row is stored as `states` has set it: see `is_stored`.
(e.status <> 'active' OR e.visit = state.visit AND e.leases = state.leases
 AND e.leased_by IS NOT DISTINCT FROM state.leased_by
 AND (e.wake_at > $17::timestamptz OR e.wake_at = state.wake_at))

-- name: write_each
-- Write the new states of enrollments that differ. Return how many are stored as they were written.
WITH written AS (
    {states} RETURNING {each_is_stored} AS is_stored
)
SELECT count(*) FILTER (WHERE is_stored) FROM written;

-- name: write_unchanged
-- Write the new states of a few enrollments and their events without a transaction around it: only if none
-- has been written since the transactions $28 and none is locked by another session, and if their
-- sequence $30 still has the revision $29. A server that has lost commits uses numbers of transactions again,
-- so $31 and $32 are the holder and the numbers of their leases. Return the number of this transaction, if what it has written
-- is what was asked for; NULL where triggers of others may have changed that. A division by zero undoes it
-- all if a row is not stored as it was written.
WITH free AS MATERIALIZED (
    SELECT e.id
      FROM unnest($1::text::bigint[], $28::text::xid[]) AS known (id, version)
      JOIN sequencer.enrollments AS e ON e.id = known.id AND e.xmin = known.version
     WHERE e.leased_by IS NOT DISTINCT FROM $31 AND e.leases = ANY ((SELECT $32::text::int[])::int[])
       AND EXISTS (SELECT FROM sequencer.sequences AS q WHERE q.name = $30 AND q.revision = $29)
       FOR UPDATE OF e SKIP LOCKED
), all_free AS MATERIALIZED (
    SELECT count(*) = cardinality($1::text::bigint[]) AS yes FROM free
), written AS (
    {states} AND (SELECT yes FROM all_free) RETURNING {each_is_stored} AS is_stored
), recorded AS (
    INSERT INTO sequencer.events {event}
    SELECT * FROM ({happened}) AS happened WHERE (SELECT yes FROM all_free)
)
SELECT {number_unless_changed} AS number
 WHERE CASE WHEN (SELECT yes FROM all_free)
            THEN 1 / ((SELECT count(*) FILTER (WHERE is_stored) FROM written)
                      = cardinality($1::text::bigint[]))::integer = 1 END;

-- part: happened_to_each
-- Events that are the same for each enrollment that was written.
SELECT written.id, what.*
  FROM written CROSS JOIN unnest($18::timestamptz[], $19::text[], $20::text[], $21::int[], $22::text[],
                                 $23::text[], $24::int[], $25::real[]) AS what

-- name: write_one_unchanged
-- Write the new state of one enrollment and its events, like write_unchanged, without its arrays of states:
-- a lone enrollment starts sooner. Only if it has not been written since the transactions $26 and is not
-- locked, and if its sequence $28 still has the revision $27.
WITH written AS (
    {write_state}
     WHERE id = (SELECT e.id FROM sequencer.enrollments AS e
                  WHERE e.id = $1 AND e.xmin = ANY ($26::text::xid[])
                    AND e.leased_by IS NOT DISTINCT FROM $29 AND e.leases = ANY ($30::text::int[])
                    AND EXISTS (SELECT FROM sequencer.sequences AS q WHERE q.name = $28 AND q.revision = $27)
                    FOR UPDATE OF e SKIP LOCKED)
    RETURNING id, {is_stored} AS is_stored
), recorded AS (
    INSERT INTO sequencer.events {event}
    {happened_to_each}
)
SELECT {number_unless_changed} AS number FROM written WHERE 1 / coalesce(is_stored, false)::integer = 1;

-- name: write_alike_unchanged
-- Write the new state of enrollments that have the same, and insert the same events for each, like
-- write_unchanged: only if none has been written since the transactions $26 and none is locked, and if their
-- sequence $28 still has the revision $27. A subselect converts a text to an array once, not for each row.
WITH free AS MATERIALIZED (
    SELECT e.ctid FROM sequencer.enrollments AS e
     WHERE e.id = ANY ($1::text::bigint[]) AND e.xmin = ANY ((SELECT $26::text::xid[])::xid[])
       AND e.leased_by IS NOT DISTINCT FROM $29 AND e.leases = ANY ((SELECT $30::text::int[])::int[])
       AND EXISTS (SELECT FROM sequencer.sequences AS q WHERE q.name = $28 AND q.revision = $27)
       FOR UPDATE OF e SKIP LOCKED
), written AS (
    {write_state}
     WHERE ctid = ANY (ARRAY(SELECT ctid FROM free))
       AND (SELECT count(*) FROM free) = cardinality($1::text::bigint[])
    RETURNING id, {is_stored} AS is_stored
), recorded AS (
    INSERT INTO sequencer.events {event}
    {happened_to_each}
)
SELECT {number_unless_changed} AS number FROM written
HAVING CASE WHEN count(*) > 0
            THEN 1 / (count(*) FILTER (WHERE is_stored) = cardinality($1::text::bigint[]))::integer = 1 END;

-- name: number_of_writes
-- Read the number of this transaction, unless triggers of others may have changed what it has written.
SELECT {number_unless_changed};

-- name: write_goals
-- Write the goals that one enrollment has met, in its sequence and in those that it has left.
UPDATE sequencer.enrollments SET goals_met = $2, goals_elsewhere = $3 WHERE id = $1;

-- name: merge_data
-- Merge changes into an enrollment's data, and remove keys.
UPDATE sequencer.enrollments SET data = (data || $2) - $3::text[] WHERE id = $1;

-- name: extend_leases
-- Extend the leases of everything that this daemon is executing.
UPDATE sequencer.enrollments AS e SET wake_at = $3
  FROM (SELECT id FROM sequencer.enrollments
         WHERE id = ANY ($1::bigint[]) AND leased_by = $2 AND {is_active}
         ORDER BY id FOR UPDATE SKIP LOCKED) AS mine
 WHERE e.id = mine.id;

-- name: request_evaluation
-- Request that all enrollments waiting at steps are evaluated: from the first id on, or once more after
-- a pass that has begun. Steps that another session has locked are skipped, so that no deadlock is
-- possible.
UPDATE sequencer.steps AS s
   SET reschedule_from = coalesce(s.reschedule_from, 0), reschedule_again = coalesce(s.reschedule_from > 0, false)
  FROM (SELECT t.sequence, t.name FROM sequencer.steps AS t
          JOIN unnest($1::text[], $2::text[]) AS p (sequence, name)
            ON p.sequence = t.sequence AND p.name = t.name
           FOR NO KEY UPDATE OF t SKIP LOCKED) AS free
 WHERE s.sequence = free.sequence AND s.name = free.name
RETURNING s.sequence, s.name;

-- name: waiting_of_subjects
-- Read the waiting enrollments of some subjects, by id.
SELECT id, subject, sequence, step FROM sequencer.enrollments
 WHERE subject = ANY ($1::text[]) AND id > $2 AND {is_active} AND wake_at > $3
   AND leased_by IS NULL AND entered_at IS NOT NULL
 ORDER BY id LIMIT $4;

-- name: unfinished_rescheduling
-- Read the steps whose waiting enrollments have yet to be evaluated, and from which id on.
SELECT sequence, name, reschedule_from FROM sequencer.steps WHERE reschedule_from IS NOT NULL;

-- name: acquire_requests_lock
-- Try to acquire the lock of the one daemon that handles the requests that applications send by NOTIFY.
SELECT pg_try_advisory_lock({requests_lock});

-- name: rescheduling_from
-- Read from which id on the enrollments waiting at a step have yet to be evaluated.
SELECT reschedule_from FROM sequencer.steps WHERE sequence = $1 AND name = $2;

-- name: active_ids
-- Read the ids of the active enrollments at a step, in an order that changed wake times leave as it is.
SELECT id FROM sequencer.enrollments
 WHERE sequence = $1 AND step = $2 AND status = 'active' AND id >= $3 ORDER BY id LIMIT $4;

-- name: lock_rescheduling
-- Lock a step until the end of the transaction, so that this daemon alone evaluates what waits there. A
-- step that another daemon has locked is skipped.
SELECT true FROM sequencer.steps
 WHERE sequence = $1 AND name = $2 AND reschedule_from = $3
   AND EXISTS (SELECT FROM sequencer.sequences WHERE name = $1 AND revision = $4)
   FOR NO KEY UPDATE SKIP LOCKED;

-- name: record_progress
-- Record up to which id a step is done, in the transaction that evaluated them.
UPDATE sequencer.steps SET reschedule_from = $3 WHERE sequence = $1 AND name = $2;

-- part: waiting_at_step
-- Those of the enrollments $3 that wait at a step.
FROM sequencer.enrollments AS e
 WHERE e.sequence = $1 AND e.step = $2 AND e.id = ANY ($3::bigint[]) AND {is_active}
   AND e.wake_at > $4 AND e.leased_by IS NULL AND e.entered_at IS NOT NULL

-- name: lock_waiting
-- Lock and read enrollments that wait at a changed step. Due ones are evaluated under the change anyway.
-- None if the definition is not the known revision.
SELECT {enrollment}
  {waiting_at_step}
   AND EXISTS (SELECT FROM sequencer.sequences AS q WHERE q.name = $1 AND q.revision = $5)
 ORDER BY e.id
   FOR UPDATE OF e SKIP LOCKED;

-- name: waiting
-- Find the enrollments that `lock_waiting` would lock, without a lock.
SELECT e.id
  {waiting_at_step}
 ORDER BY e.id;

-- name: finish_rescheduling
-- Record that a step is done, unless a request arrived meanwhile; return whether one did.
UPDATE sequencer.steps AS s
   SET reschedule_from = CASE WHEN s.reschedule_again THEN 0 END, reschedule_again = false
 WHERE sequence = $1 AND name = $2 AND reschedule_from = $3
RETURNING reschedule_from IS NOT NULL AS again;

-- name: new_transaction
-- Draw a transaction number. The xmax of a snapshot would not suffice: transactions in progress may have
-- greater numbers.
SELECT {transaction};

-- name: oldest_transaction
-- Read the number of the oldest transaction that is still in progress.
SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint;

-- name: failed_steps
-- Find the steps of sequences from $1 to $2 with enrollments that failed because their step was invalid.
-- It skips from one step to the next in the index, however many have failed there.
WITH RECURSIVE step_key AS (
    (SELECT e.sequence, e.step FROM sequencer.enrollments AS e
      WHERE e.status = 'failed' AND e.sequence >= $1 AND e.sequence <= $2
      ORDER BY e.sequence, e.step LIMIT 1)
    UNION ALL
    SELECT following.* FROM step_key CROSS JOIN LATERAL (
        SELECT e.sequence, e.step FROM sequencer.enrollments AS e
         WHERE e.status = 'failed' AND (e.sequence, e.step) > (step_key.sequence, step_key.step)
           AND e.sequence <= $2
         ORDER BY e.sequence, e.step LIMIT 1) AS following
)
SELECT k.sequence, k.step FROM step_key AS k
 WHERE EXISTS (SELECT FROM sequencer.enrollments AS e
                WHERE e.status = 'failed' AND e.sequence = k.sequence AND e.step = k.step
                  AND e.failure = 'invalid_step');

-- name: revive
-- Resume a batch of the enrollments that failed because their step was invalid, now that it is valid.
WITH revived AS (
    UPDATE sequencer.enrollments AS e
       SET status = 'active', wake_at = $3, ended_at = NULL, failure = NULL, last_error = NULL,
           attempt = 0, retry_at = NULL, leased_by = NULL, executed = '{}'
     WHERE e.id = ANY (ARRAY(
        SELECT f.id FROM unnest($1::text[], $2::text[]) AS fixed (sequence, step)
         CROSS JOIN LATERAL (
            SELECT f.id FROM sequencer.enrollments AS f
             WHERE f.sequence = fixed.sequence AND f.step = fixed.step
               AND f.status = 'failed' AND f.failure = 'invalid_step' LIMIT $4 FOR UPDATE) AS f
         LIMIT $4))
    RETURNING e.id, e.sequence, e.step, e.visit
)
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)
SELECT id, $3, sequence, step, visit, 'resumed', 'the step was fixed' FROM revived;

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
-- Delete a batch of the enrollments that ended before a time, and return how many, and where the next one
-- begins.
SELECT deleted, next_sequence, next_since FROM sequencer.delete_ended($1, $2, $3, $4);

-- name: try_lock_retention
-- Try to acquire the lock of the one daemon that runs retention, until the end of the transaction.
SELECT pg_try_advisory_xact_lock({retention_lock});

-- name: suppressed
-- Find which addresses are suppressed, each for a topic or for all of them.
SELECT channel, address, topic FROM sequencer.suppressions
 WHERE (channel, address, topic) IN (SELECT * FROM unnest($1::text[], $2::text[], $3::text[]));

-- name: suppress
-- Suppress addresses for a topic; those that are suppressed stay as they are.
INSERT INTO sequencer.suppressions (channel, address, topic, reason, source)
SELECT channel, address, $5, reason, source
  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS u (channel, address, reason, source)
 WHERE octet_length(address) BETWEEN 1 AND 1000
 ORDER BY channel, address
ON CONFLICT DO NOTHING;

-- name: unsuppress
-- Lift suppressions of one source.
DELETE FROM sequencer.suppressions
 WHERE channel = $1 AND address = ANY ($2::text[]) AND topic = ANY ($3::text[]) AND source = $4;

-- name: titles
-- Read the titles of topics, which recipients see.
SELECT name, title FROM sequencer.topics;

-- name: sent_messages
-- Read what was sent in a visit, given the half of the random tag that messages have.
SELECT v.message FROM sequencer.enrollments AS e
  JOIN sequencer.events AS v ON v.enrollment_id = e.id AND v.visit = $2
 WHERE e.id = $1 AND left(replace(e.tag::text, '-', ''), 16) = $3 AND v.message LIKE '%sent to %';

-- name: row_security
-- Find the tables in which row-level security may hide rows from the present user, or from the owner, whose
-- rights triggers and functions have; and whether all rows are hidden, because no policy permits any.
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
                    WHERE CASE WHEN role = 0 THEN true ELSE pg_has_role(u.oid, role, 'USAGE') END)
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

-- name: reserve
-- Give back and reserve places under limits; return the entries that found no place, and when there is one.
SELECT entry, free_at
  FROM sequencer.reserve($1::integer[], $2::bytea[], $3::text[], $4::bigint[], $5::integer[],
                         $6::integer[], $7::interval[], $8);

-- name: brake_remaining
-- Lock the brakes of sequences, and read how many side effects may begin in each. What was counted while the
-- server's clock was ahead would count until that time: it counts no more.
SELECT b.sequence, r.at_most - (SELECT coalesce(sum(o.times), 0) FROM unnest(b.at, b.times) AS o (at, times)
                                 WHERE o.at > $2::timestamptz - r.per
                                   AND o.at < $2::timestamptz + r.per + interval '1 day')::integer AS remaining
  FROM sequencer.brakes AS b
  JOIN sequencer.sequences AS q ON q.name = b.sequence, sequencer.brake_of(
           q.brake_at_most, q.brake_per, q.apply_brake, q.apply_brake_until, $2) AS r
 WHERE b.sequence = ANY ($1::text[]) AND r.at_most IS NOT NULL
 ORDER BY b.sequence
   FOR UPDATE OF b;

-- name: brake
-- Count side effects that have begun in sequences, and pause those where more would have.
SELECT sequencer.brake(sequence, begun, is_over, $4)
  FROM unnest($1::text[], $2::integer[], $3::boolean[]) AS c (sequence, begun, is_over);

-- name: prune_reservations
-- Delete a batch of the reservations that no limit counts any more. Rows that a daemon has locked to reserve
-- others are skipped: to wait for them could be a deadlock.
DELETE FROM sequencer.reservations WHERE key = ANY (ARRAY(
    SELECT key FROM sequencer.reservations WHERE counts_until < $1 LIMIT $2 FOR UPDATE SKIP LOCKED));

-- part: activity_of
-- Which events are counted by hour, and as what.
FROM (SELECT sequence, date_trunc('hour', at, 'UTC') AS hour, step,
             CASE WHEN action = 'branch' THEN 'branch ' || left(message, 200)
                  WHEN action = 'goal' THEN 'goal ' || left(split_part(message, ' is met', 1), 200)
                  ELSE action END AS action
        FROM sequencer.events
       WHERE at >= $1 AND at < $2
         AND action IN ('enrolled', 'next', 'altNext', 'branch', 'goal', 'jump', 'completed', 'failed',
                        'cancelled', 'suppressed', 'expired', 'limited', 'retry')) AS v
 GROUP BY sequence, hour, step, action

-- part: is_plausible
-- Whether the history can have been counted up to a time, with a day's margin.
p."until" BETWEEN $2::timestamptz - $3::interval - interval '1 day' AND $2::timestamptz + interval '1 day'

-- name: begin_activity
-- Set where counting the history by hour begins: with its oldest partition, but at most so long ago. Also
-- where it has a time that is out of range.
INSERT INTO sequencer.activity_progress AS p (after, "until")
SELECT d.after, date_trunc('hour', greatest($2::timestamptz - $3::interval, (
           SELECT min(to_date(substring(c.relname FROM '^events_(\d{4}_\d\d)$'), 'YYYY_MM')::timestamp
                      AT TIME ZONE 'UTC')
             FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
            WHERE i.inhparent = 'sequencer.events'::regclass)), 'UTC')
  FROM unnest($1::interval[]) AS d (after)
ON CONFLICT (after) DO UPDATE SET "until" = excluded."until" WHERE NOT ({is_plausible});

-- name: activity_progress
-- Read up to when the history has been counted, by how long after the end of an hour. A time in the future,
-- as after the server's clock was wrong, would stop the counting until then.
SELECT after, "until" FROM sequencer.activity_progress AS p
 WHERE after = ANY ($1::interval[]) AND {is_plausible} ORDER BY after;

-- name: count_activity
-- Count the history between two full hours.
WITH counted AS MATERIALIZED (
    SELECT sequence, hour, step, action, count(*) AS times {activity_of}
)
INSERT INTO sequencer.activity AS a (sequence, hour, step, action, times)
SELECT sequence, hour, step, action, times FROM counted
ON CONFLICT (sequence, hour, step, action)
DO UPDATE SET times = excluded.times WHERE a.times < excluded.times;

-- name: note_activity
-- Record up to when the history has been counted.
UPDATE sequencer.activity_progress SET "until" = $2 WHERE after = $1;

-- name: prune_activity
-- Delete the counts of hours that began before a time.
DELETE FROM sequencer.activity WHERE hour < $1;

-- name: note_lateness
-- Record how many enrollments of a claim are late at each step, also by more than a minute and ten minutes, and
-- by how many seconds at most.
INSERT INTO sequencer.lateness (at, sequence, step, times, over_minute, over_ten_minutes, longest)
SELECT $1, * FROM unnest($2::text[], $3::text[], $4::int[], $5::int[], $6::int[], $7::float8[]);

-- name: sum_lateness
-- Replace what claims have recorded before a time by sums for each hour, at most so many rows at once.
WITH first AS (
    SELECT ctid FROM sequencer.lateness WHERE NOT is_hour AND at < $1 ORDER BY at LIMIT $2
), taken AS (
    DELETE FROM sequencer.lateness WHERE ctid = ANY (ARRAY(SELECT ctid FROM first)) RETURNING *
)
INSERT INTO sequencer.lateness (sequence, step, at, times, over_minute, over_ten_minutes, longest, is_hour)
SELECT sequence, step, date_trunc('hour', at, 'UTC'), sum(times), sum(over_minute), sum(over_ten_minutes),
       max(longest), true
  FROM taken GROUP BY 1, 2, 3;

-- name: prune_lateness
-- Delete the lateness recorded before a time.
DELETE FROM sequencer.lateness WHERE at < $1;

-- name: take_permits
-- Take permits of a runner, whose rate all daemons share. They begin at the end of those that were taken
-- before, or now. Up to 25 ms of the past count, so that the time of this statement is not lost; after a rate
-- that was set far too low by mistake, calls wait for 10 seconds at most, or for as long as a hundred of them
-- take.
SELECT first, present FROM sequencer.take_permits($1, $2, $3);
