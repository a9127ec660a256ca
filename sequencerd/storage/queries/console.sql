-- Statements of the console.

-- name: refusing
-- Find the sequences that would refuse a jump of an enrollment, because its subject is enrolled there.
SELECT DISTINCT sequence FROM sequencer.enrollments
 WHERE subject = $1 AND entry = 0 AND id <> $2;

-- name: without_parallel_workers
-- Let each statement of this transaction use only one process of the server.
SET LOCAL max_parallel_workers_per_gather = 0;

-- name: console_sequences
-- Read all sequences for the console.
SELECT name, description, status, timezone, first_step, revision FROM sequencer.sequences ORDER BY name;

-- name: console_steps
-- Count the enrollments of each step that are due within the hour, and those overdue; in a paused sequence
-- none is due. It reads only this part of the index of due enrollments, and at most the limit for each step.
SELECT s.sequence, s.name AS step, s.type, s.next_step, s.alt_next_step, s.config, s.problem,
       a.soon, a.overdue
  FROM sequencer.steps AS s JOIN sequencer.sequences AS q ON q.name = s.sequence
 CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE wake_at >= $1::timestamptz - interval '1 minute') AS soon,
           count(*) FILTER (WHERE wake_at < $1 - interval '1 minute') AS overdue
      FROM (SELECT e.wake_at FROM sequencer.enrollments AS e
             WHERE q.status <> 'paused' AND e.sequence = s.sequence AND e.step = s.name
               AND e.status = 'active' AND e.wake_at <= $1::timestamptz + interval '1 hour'
             ORDER BY e.wake_at LIMIT $2) AS first) AS a
 ORDER BY s.sequence, s.position;

-- name: console_active
-- Count the active enrollments of each step, in one pass: through the index where VACUUM has been, else
-- through the table. A query for each step would read the table once per step.
SELECT sequence, step, count(*) AS active
  FROM sequencer.enrollments WHERE status = 'active' GROUP BY sequence, step;

-- name: console_next
-- Count the enrollments that are checked next, in periods of ten minutes from a time on. At most the limit
-- are read for each step, from the index of due enrollments.
SELECT date_bin('10 minutes', a.wake_at, $1) AS at, s.sequence, count(*) AS enrollments
  FROM sequencer.steps AS s
  JOIN sequencer.sequences AS q ON q.name = s.sequence AND q.status <> 'paused'
 CROSS JOIN LATERAL (
    SELECT e.wake_at FROM sequencer.enrollments AS e
     WHERE e.sequence = s.sequence AND e.step = s.name AND e.status = 'active'
       AND e.wake_at >= $1 AND e.wake_at < $2
     ORDER BY e.wake_at LIMIT $3) AS a
 GROUP BY 1, 2 ORDER BY 1, 2;

-- name: console_failed
-- Count the failed enrollments by step; at most the limit are counted.
SELECT sequence, step, count(*) AS failed
  FROM (SELECT sequence, step FROM sequencer.enrollments WHERE status = 'failed'
         ORDER BY sequence, step LIMIT $1) AS first
 GROUP BY sequence, step;

-- name: console_causes
-- Count the failed enrollments by cause and step, each with an example; at most the first limit are read, and
-- as many of the most frequent are returned as the second one allows.
SELECT g.*, x.last_error, x.data, x.subject
  FROM (SELECT {cause} AS cause, e.sequence, e.step, e.failure, count(*) AS failed,
               min(e.ended_at) AS since, max(e.ended_at) AS latest, max(e.id) AS example
          FROM (SELECT * FROM sequencer.enrollments WHERE status = 'failed'
                 ORDER BY sequence, step, failure LIMIT $1) AS e
         GROUP BY 1, 2, 3, 4 ORDER BY failed DESC LIMIT $2) AS g
  LEFT JOIN sequencer.enrollments AS x ON x.id = g.example;

-- name: console_last_id
-- Read the largest id below the given one.
SELECT max(id) FROM sequencer.enrollments WHERE id < $1;

-- name: console_list
-- Read the latest enrollments that match, in a range of ids.
SELECT e.id, e.subject, e.sequence, e.step, e.status, e.wake_at, e.entered_at, e.created_at, e.ended_at,
       e.attempt, e.failure, e.last_error, e.data,
       CASE WHEN e.leased_by IS NULL THEN coalesce(e.waits_until, e.wake_at) END AS waits_until
  FROM sequencer.enrollments AS e
 WHERE {matching} AND e.id >= $18 AND e.id < $19
 ORDER BY e.id DESC LIMIT $20;

-- name: console_failed_ids
-- Find failed enrollments by their index; at most the limit.
SELECT id FROM sequencer.enrollments
 WHERE status = 'failed' AND ($1::text IS NULL OR sequence = $1) AND ($2::text IS NULL OR step = $2)
 LIMIT $3;

-- name: console_active_ids
-- Find the active enrollments of a sequence that are checked in a period, by the index of due enrollments:
-- with a lookup for each step that has any, and then for each of these steps; at most the limit.
WITH RECURSIVE used (step) AS (
    (SELECT step FROM sequencer.enrollments
      WHERE sequence = $1 AND status = 'active' AND ($2::text IS NULL OR step = $2) ORDER BY step LIMIT 1)
    UNION ALL
    SELECT following.step FROM used AS u CROSS JOIN LATERAL (
        SELECT step FROM sequencer.enrollments
         WHERE sequence = $1 AND status = 'active' AND ($2::text IS NULL OR step = $2) AND step > u.step
         ORDER BY step LIMIT 1) AS following
)
SELECT found.id FROM used AS u CROSS JOIN LATERAL (
    SELECT id FROM sequencer.enrollments
     WHERE sequence = $1 AND step = u.step AND status = 'active'
       AND ($3::timestamptz IS NULL OR wake_at >= $3) AND ($4::timestamptz IS NULL OR wake_at < $4)
     LIMIT $5) AS found
 LIMIT $5;

-- name: console_flow
-- Count the events at steps between two times, by day; the events of branches are counted by branch.
SELECT date_trunc('day', at AT TIME ZONE 'UTC')::date AS day, sequence, step,
       CASE WHEN action = 'branch' THEN 'branch ' || message ELSE action END AS action,
       count(*) AS times
  FROM sequencer.events
 WHERE at >= $1 AND at < $2
   AND action IN ('enrolled', 'next', 'altNext', 'goal', 'jump', 'branch', 'completed', 'failed')
 GROUP BY 1, 2, 3, 4;

-- name: console_stays
-- Measure the length of visits that ended between two times, in seconds, for a sample: one enrollment in so
-- many, and at most the limit.
SELECT v.sequence, v.step, extract(epoch FROM v.at - (
           SELECT max(p.at) FROM sequencer.events AS p
            WHERE p.enrollment_id = v.enrollment_id AND p.at <= v.at
              AND (p.visit < v.visit OR p.action = 'enrolled')))::float8 AS seconds
  FROM (SELECT * FROM sequencer.events
         WHERE at >= $1 AND at < $2 AND action IN ('next', 'altNext', 'goal', 'jump', 'branch')
           AND abs(hashint8(enrollment_id)::bigint) % $3 = 0 LIMIT $4) AS v;

-- name: console_waiting
-- Read a page of the active enrollments at a step, by wake time. Many may have the same wake time, so a
-- page begins at an offset within it.
SELECT id, subject, status, wake_at, entered_at, attempt, last_error, data,
       CASE WHEN leased_by IS NULL THEN coalesce(waits_until, wake_at) END AS waits_until
  FROM sequencer.enrollments
 WHERE sequence = $1 AND step = $2 AND status = 'active' AND wake_at >= $3
 ORDER BY wake_at LIMIT $5 OFFSET $4;

-- name: console_splits
-- Read the names of the Split steps of a sequence; no row if it does not exist.
SELECT ARRAY(SELECT s.name FROM sequencer.steps AS s
              WHERE s.sequence = q.name AND s.type = 'Split' ORDER BY s.position) AS splits
  FROM sequencer.sequences AS q WHERE q.name = $1;

-- name: console_funnel
-- Count the visits that began since a time, of each step and each way out of it, for all enrollments and for
-- each arm of a Split.
SELECT * FROM sequencer.funnel($1, $2, $3);

-- name: console_wakes
-- Count the first enrollments at a step by when they are next checked, in so many equal periods; those that
-- are checked only after a change have none. It reads at most so many entries of an index.
WITH first AS (
    SELECT wake_at FROM sequencer.enrollments
     WHERE sequence = $1 AND step = $2 AND status = 'active' ORDER BY wake_at LIMIT $3
), bounds AS (
    SELECT min(wake_at) AS least,
           greatest((max(wake_at) - min(wake_at)) / $4::integer, interval '1 minute') AS width
      FROM first WHERE wake_at < 'infinity'
), bars AS (
    SELECT CASE WHEN f.wake_at < 'infinity'
                THEN least(floor(extract(epoch FROM f.wake_at - b.least)
                                 / extract(epoch FROM b.width))::integer, $4 - 1) END AS bar,
           count(*) AS number
      FROM first AS f CROSS JOIN bounds AS b GROUP BY 1
)
SELECT r.bar, r.number, b.least + r.bar * b.width AS since, b.least + (r.bar + 1) * b.width AS until
  FROM bars AS r CROSS JOIN bounds AS b ORDER BY r.bar;

-- name: console_example
-- Find an enrollment whose message can be shown: one that is at the step, else one of the first at any
-- step of the sequence.
SELECT first.id FROM (
    (SELECT id, 0 AS rank FROM sequencer.enrollments
      WHERE sequence = $1 AND step = $2 AND status = 'active' ORDER BY wake_at LIMIT 1)
    UNION ALL
    (SELECT id, 1 FROM sequencer.enrollments
      WHERE sequence = $1 AND status = 'active' ORDER BY step, wake_at LIMIT 1)
) AS first ORDER BY rank LIMIT 1;

-- name: console_history
-- Read the latest events of an enrollment up to a time. Several may have the same time, so a page begins at
-- an offset within it.
SELECT at, sequence, step, visit, action, message, revision
  FROM sequencer.events WHERE enrollment_id = $1 AND at <= $2
 ORDER BY at DESC, visit DESC, action = 'enrolled', action, message LIMIT $4 OFFSET $3;

-- name: console_versions
-- Build a version for each enrollment that differs after any change to what its page shows: by a write, or
-- because it becomes due or daemons report a problem.
SELECT e.id, concat_ws('-', e.xmin, e.ctid, extract(epoch FROM (
           SELECT max(v.at) FROM sequencer.events AS v WHERE v.enrollment_id = e.id)), q.revision,
           e.wake_at <= now(), md5(concat_ws('-', s.problem, r.kind, r.since, r.message))) AS version
  FROM sequencer.enrollments AS e
  LEFT JOIN sequencer.steps AS s ON s.sequence = e.sequence AND s.name = e.step
  LEFT JOIN sequencer.sequences AS q ON q.name = e.sequence
  {reported}
 WHERE e.id = ANY ($1::bigint[]);

-- name: console_by_subject
-- Read enrollments in a range of subjects, in order, after a given one.
SELECT id, subject, sequence, step, status, wake_at, failure, last_error, data, entry,
       CASE WHEN leased_by IS NULL THEN coalesce(waits_until, wake_at) END AS waits_until
  FROM sequencer.enrollments
 WHERE subject >= $1 AND subject < $2 AND (subject, sequence, entry) > ($3, $4, $5)
 ORDER BY subject, sequence, entry LIMIT $6;

-- name: console_by_id
-- Read one enrollment as a list does.
SELECT id, subject, sequence, step, status, wake_at, failure, last_error, data, entry,
       CASE WHEN leased_by IS NULL THEN coalesce(waits_until, wake_at) END AS waits_until
  FROM sequencer.enrollments WHERE id = $1;

-- name: console_has_at_most
-- Check whether there are at most so many enrollments.
SELECT NOT EXISTS (SELECT FROM sequencer.enrollments OFFSET $1);

-- name: console_has_email_index
-- Check whether the index of e-mail addresses exists and is valid.
SELECT EXISTS (SELECT FROM pg_index
                WHERE indexrelid = to_regclass('sequencer.enrollments_email') AND indisvalid);

-- name: console_by_email
-- Find enrollments by e-mail address, by an index, the latest first.
SELECT id, subject, sequence, step, status, wake_at, failure, last_error, data, entry,
       CASE WHEN leased_by IS NULL THEN coalesce(waits_until, wake_at) END AS waits_until
  FROM sequencer.enrollments WHERE lower(data->>'email') = lower($1) ORDER BY id DESC LIMIT $2;

-- name: console_by_email_of_latest
-- Find enrollments by e-mail address among the latest, where there is no index, the latest first.
SELECT id, subject, sequence, step, status, wake_at, failure, last_error, data, entry,
       CASE WHEN leased_by IS NULL THEN coalesce(waits_until, wake_at) END AS waits_until
  FROM (SELECT * FROM sequencer.enrollments ORDER BY id DESC LIMIT $3) AS latest
 WHERE lower(data->>'email') = lower($1) ORDER BY id DESC LIMIT $2;

-- name: console_revisions
-- Read a page of the revisions of a sequence, the latest first, each with the document before it.
SELECT r.revision, r.at, r.by, r.reason, r.document,
       (SELECT b.document FROM sequencer.revisions AS b
         WHERE b.sequence = r.sequence AND b.revision < r.revision
         ORDER BY b.revision DESC LIMIT 1) AS before
  FROM sequencer.revisions AS r
 WHERE r.sequence = $1 AND r.revision <= $2::bigint
 ORDER BY r.revision DESC LIMIT $3;

-- name: console_data
-- Read the data of an enrollment for editing.
SELECT subject, data, md5(data::text) AS version FROM sequencer.enrollments WHERE id = $1;

-- name: console_pretty
-- Write JSON over several lines, as PostgreSQL stores it.
SELECT jsonb_pretty($1::jsonb);

-- name: console_set_data
-- Replace the data of an enrollment, if it is still as the user saw it, and record the change.
WITH changed AS (
    UPDATE sequencer.enrollments SET data = $2::jsonb
     WHERE id = $1 AND md5(data::text) = $3 RETURNING id, sequence, step, visit
)
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)
SELECT id, clock_timestamp(), sequence, step, visit, 'edited', 'by ' || session_user || ': ' || $4::text
  FROM changed;

-- name: console_created
-- Record that a user has enrolled a subject.
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)
SELECT id, clock_timestamp(), sequence, step, visit, 'created', 'by ' || session_user || ': ' || $2::text
  FROM sequencer.enrollments WHERE id = $1;

-- name: console_blocking
-- Find the enrollment that keeps a subject from being enrolled again.
SELECT id, status FROM sequencer.enrollments
 WHERE sequence = $1 AND subject = $2 AND entry = 0;

-- name: console_channels
-- Read the channels of suppressions, with one index lookup for each; at most a hundred.
WITH RECURSIVE known (channel, number) AS (
    (SELECT channel, 1 FROM sequencer.suppressions ORDER BY channel LIMIT 1)
    UNION ALL
    SELECT (SELECT s.channel FROM sequencer.suppressions AS s WHERE s.channel > k.channel ORDER BY s.channel
             LIMIT 1), k.number + 1
      FROM known AS k WHERE k.channel IS NOT NULL AND k.number < 100
)
SELECT channel FROM known WHERE channel IS NOT NULL;

-- name: console_suppressions
-- Read a page of the suppressions of some channels whose address begins with a text, in order, after a given
-- one. At most the limit are searched; if there are more, the last one that was searched is returned as well.
WITH scanned AS MATERIALIZED (
    SELECT s.* FROM unnest($1::text[], $2::text[]) AS c (channel, start) CROSS JOIN LATERAL (
        SELECT * FROM sequencer.suppressions AS a
         WHERE a.channel = c.channel AND a.address >= c.start AND a.address < c.start || $3
           AND (a.channel, a.address, a.topic) > (($6::text[])[1], ($6::text[])[2], ($6::text[])[3])
         ORDER BY a.address, a.topic LIMIT $8) AS s
     ORDER BY s.channel, s.address, s.topic LIMIT $8
)
(SELECT channel, address, topic, source, reason, created_at, false AS is_last FROM scanned
  WHERE ($4::text IS NULL OR topic = $4) AND ($5::text IS NULL OR source = $5)
  ORDER BY channel, address, topic LIMIT $7)
UNION ALL
(SELECT channel, address, topic, source, reason, created_at, true FROM scanned
  WHERE (SELECT count(*) FROM scanned) = $8 ORDER BY channel DESC, address DESC, topic DESC LIMIT 1);

-- name: console_suppression
-- Read the entries of an address, in the forms that it may have.
SELECT channel, address, topic, source, reason, created_at FROM sequencer.suppressions
 WHERE channel = $1 AND address = ANY ($2::text[]) AND topic = $3 ORDER BY created_at;

-- name: console_unsuppress
-- Remove the entries of an address; unless that is confirmed, only those with one of the sources.
DELETE FROM sequencer.suppressions
 WHERE channel = $1 AND address = ANY ($2::text[]) AND topic = $3 AND ($4::text[] IS NULL OR source = ANY ($4));

-- name: console_unsuppressed
-- Read the suppressions that were removed last.
SELECT removed_at, channel, topic, source, created_at, reason
  FROM sequencer.removed_suppressions ORDER BY id DESC LIMIT 10;

-- name: console_sequence
-- Read the present revision of a sequence with its author, and whether files manage it.
SELECT s.revision, s.status, s.from_file, r.by, r.reason
  FROM sequencer.sequences AS s
  LEFT JOIN sequencer.revisions AS r ON (r.sequence, r.revision) = (s.name, s.revision)
 WHERE s.name = $1;

-- name: console_schedule
-- Read the schedule by which a sequence enrolls what a query returns, and the result of the last run.
SELECT source, schedule, next_run_at, last_run_at, extract(epoch FROM duration)::float8 AS duration,
       found, enrolled, problem AS message
  FROM sequencer.schedules WHERE sequence = $1;

-- name: console_begin_session
-- Begin a session that all daemons know, and delete those that have expired.
WITH over AS (DELETE FROM sequencer.console_sessions WHERE expires_at < now())
INSERT INTO sequencer.console_sessions (session, "user", groups, credential, address, agent, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, now() + $7);

-- name: console_activity
-- Read what happened in each hour or day between two full hours, in one sequence or in all; at most so many
-- rows. It reads only the counts by hour.
SELECT date_trunc($3, a.hour, 'UTC') AS at, a.sequence, a.step, a.action, sum(a.times)::bigint AS times
  FROM sequencer.sequences AS s CROSS JOIN LATERAL (
    SELECT * FROM sequencer.activity AS c
     WHERE c.sequence = s.name AND c.hour >= $1 AND c.hour < $2 LIMIT $5) AS a
 WHERE $4::text IS NULL OR s.name = $4
 GROUP BY 1, 2, 3, 4;

-- name: console_activity_until
-- Read up to when the history has been counted by hour.
SELECT max("until") AS counted_until FROM sequencer.activity_progress;

-- name: console_activity_recent
-- Count what the counts by hour do not have yet.
SELECT hour AS at, sequence, step, action, count(*) AS times {activity_of};

-- name: console_lateness
-- Read how late steps began in each hour or day between two times, in one sequence or in all. It reads the
-- latest rows, at most so many of a sequence.
SELECT date_trunc($3, a.at, 'UTC') AS at, a.sequence, a.step, sum(a.times)::bigint AS late,
       sum(a.over_minute)::bigint AS over_minute, sum(a.over_ten_minutes)::bigint AS over_ten_minutes,
       max(a.longest)::float8 AS longest, count(*)::bigint AS read
  FROM sequencer.sequences AS s CROSS JOIN LATERAL (
    SELECT * FROM sequencer.lateness AS c
     WHERE c.sequence = s.name AND c.at >= $1 AND c.at < $2 ORDER BY c.at DESC LIMIT $5) AS a
 WHERE $4::text IS NULL OR s.name = $4
 GROUP BY 1, 2, 3;

-- name: console_session
-- Read a session that has neither ended nor expired.
SELECT "user", groups, credential FROM sequencer.console_sessions
 WHERE session = $1 AND expires_at > now();

-- name: console_sessions_of
-- Read the sessions of a user, or of all, the latest first.
SELECT session, "user", groups IS NOT NULL AS is_oidc, address, agent, begun_at, expires_at
  FROM sequencer.console_sessions
 WHERE expires_at > now() AND ($1::text IS NULL OR "user" = $1)
 ORDER BY begun_at DESC, session LIMIT 1000;

-- name: console_end_session
-- End a session for all daemons, of a user or of any.
DELETE FROM sequencer.console_sessions WHERE session = $1 AND ($2::text IS NULL OR "user" = $2);
