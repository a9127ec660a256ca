-- sequencerd keeps everything in the schema "sequencer":
--
--   sequences     what may happen: a named graph of steps, its zone, status and reentry policy
--   steps         the nodes of that graph: type, config and next steps
--   enrollments   one row for each journey of a subject through a sequence: where it is, when it wakes
--   events        what happened: append only, partitioned by month
--   revisions     former definitions: a document for each change, however it was made
--   topics        what messages are about, in words for their recipients
--   reservations  side effects that limits count
--   rates         up to when permits are taken, for runners with a limited rate
--   brakes        side effects that brakes count, and which sequences they have paused
--   suppressions  addresses to which no messages are sent, for one topic or all
--   removed_suppressions  removed entries: by which user and why
--   holidays      days on which windows do not open, and which are not business days
--   daemons       which daemons run, and until when each is considered alive
--   problems      what daemons report for operators
--   scheduled_runs  the last and the next run of sequences that enroll by a query
--   activity      counts of events by step and hour
--   lateness      enrollments that began their step late
--   console_sessions  the sessions of the console's users
--   shard         which of several shards this schema is
--   migrations    which files of sql/ have been applied
--
-- The life of an enrollment, as SQL:
--
--   enroll        INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES (...)
--   change data   UPDATE sequencer.enrollments SET data = data || '{...}' WHERE subject = ...
--   reevaluate    SELECT sequencer.reevaluate(subject => ...)
--   cancel        UPDATE sequencer.enrollments SET status = 'cancelled' WHERE ...
--   retry         UPDATE sequencer.enrollments SET status = 'active' WHERE status = 'failed' AND ...
--   move          UPDATE sequencer.enrollments SET step = ... WHERE ...; the same step restarts it
--   collect       SELECT sequencer.collect('digest', 'user-42', '{"comment": 7}')
--   merge         SELECT sequencer.merge('anonymous-7', 'user-42')
--   forget        SELECT * FROM sequencer.forget('user-42')
--
-- An active enrollment waits for its wake_at. When that has passed, a daemon claims the row, advances
-- it, and writes the next wake_at. While a daemon executes a side effect, leased_by names the daemon and
-- wake_at is the end of its lease; if the daemon dies, the row is due again.
--
-- Triggers fill in defaults, reject invalid rows, and notify the daemon by NOTIFY. They notify only while
-- a daemon holds the notify lock, and only of rows due before its next sweep, so a lost notification
-- delays an enrollment by a minute at most. SET LOCAL sequencer.notify = off turns notifications off for
-- a bulk load. Manual changes are recorded with the user's name and the reason given by SET LOCAL
-- sequencer.reason = '...'.
--
-- The advisory locks, all with 7364528 as their first number (AdvisoryLock in storage/statements.py):
--
--   1  migrations   migrate: one process at a time
--   2  retention    drop_event_partition and delete_ended: one daemon at a time
--   3  definitions  apply: one process at a time
--   4  notify       held by a daemon while it wants to be notified; shared by writers that do not notify
--   5  requests     held by the one daemon that handles the requests that applications send by NOTIFY
--   6  enrolling    enrolling by queries and schedules: one daemon at a time
--   7  forgetting   forget: one transaction at a time
--
-- Names and subjects are compared byte by byte (COLLATE "C"): this is faster than the rules of a
-- language, and no update of the system's libraries can corrupt their indexes.

-- IF NOT EXISTS would require the privilege to create schemas, even if an administrator has created this one.
DO $$ BEGIN
    IF to_regnamespace('sequencer') IS NULL THEN
        CREATE SCHEMA sequencer;
    END IF;
END $$;


-- definitions -----------------------------------------------------------------------------------

-- Shared by all sequences, so that no two definitions ever have the same revision, even if a name is
-- reused.
CREATE SEQUENCE sequencer.revision_numbers AS integer;

CREATE FUNCTION sequencer.next_revision() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- Citus keeps this sequence on one node, and moves the tables among the others
    IF to_regclass('sequencer.revision_numbers') IS NULL THEN
        RETURN 1 + greatest((SELECT coalesce(max(revision), 0) FROM sequencer.sequences),
                            (SELECT coalesce(max(revision), 0) FROM sequencer.revisions));
    END IF;
    RETURN nextval('sequencer.revision_numbers');
END $$;

CREATE TABLE sequencer.sequences (
    name       text COLLATE "C" PRIMARY KEY CHECK (octet_length(name) BETWEEN 1 AND 200),
    description text CHECK (octet_length(description) <= 10000),
    original_id text,
    first_step text NOT NULL CHECK (octet_length(first_step) BETWEEN 1 AND 200),
    timezone   text NOT NULL DEFAULT 'UTC',
    status     text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'paused', 'archived')),
    reentry    text NOT NULL DEFAULT 'after_end'
               CHECK (reentry IN ('after_end', 'after', 'always', 'never')),
    reentry_after interval CHECK (reentry_after IS NULL
                   OR reentry_after > '0' AND reentry_after <= '2000 years' AND num_nonnulls(
                   nullif(extract(year FROM reentry_after) * 12 + extract(month FROM reentry_after), 0),
                   nullif(extract(day FROM reentry_after), 0),
                   nullif(reentry_after - date_trunc('day', reentry_after), '0')) = 1),
    lookup     text CHECK (lookup <> ''),
    recheck    interval NOT NULL DEFAULT '1 minute'
               CHECK (recheck BETWEEN interval '1 second' AND interval '1 year'),
    time_window jsonb CHECK (jsonb_typeof(time_window) = 'object'),
    locale     text CHECK (locale ~ '^(data|external)([.][^.[:space:]{}\[\]]+)+$'),
    partials   jsonb CHECK (jsonb_typeof(partials) = 'object'
                   AND NOT partials @? '$.* ? (@.type() != "string")'),
    topic      text CHECK (topic ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$'),
    enroll     jsonb CHECK (jsonb_typeof(enroll) = 'object'),
    brake_at_most integer CHECK (brake_at_most BETWEEN 1 AND 1000000),
    brake_per  interval CHECK (brake_per BETWEEN '1 second' AND '366 days'
                   AND extract(epoch FROM brake_per) % 1 = 0
                   AND brake_per = make_interval(secs => extract(epoch FROM brake_per)::float8)
                   AND extract(day FROM brake_per) = 0 AND extract(month FROM brake_per) = 0),
    apply_brake integer CHECK (apply_brake BETWEEN 1 AND 1000000),
    apply_brake_until timestamptz CHECK (apply_brake_until BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    revision   integer NOT NULL DEFAULT 1,
    from_file  boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now()
               CHECK (created_at BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    resumed_at timestamptz CHECK (resumed_at BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    CONSTRAINT after_has_reentry_after CHECK ((reentry = 'after') = (reentry_after IS NOT NULL)),
    CONSTRAINT brake_at_most_has_brake_per CHECK ((brake_at_most IS NULL) = (brake_per IS NULL)),
    CONSTRAINT apply_brake_has_apply_brake_until
        CHECK ((apply_brake IS NULL) = (apply_brake_until IS NULL))
);

COMMENT ON TABLE  sequencer.sequences IS 'Named graphs of steps.';
COMMENT ON COLUMN sequencer.sequences.description IS 'What the sequence is for, for operators; has no effect.';
COMMENT ON COLUMN sequencer.sequences.original_id IS 'Its id and title in the original Sequencer, if it was imported; another import recognises it by this.';
COMMENT ON COLUMN sequencer.sequences.first_step IS 'Where an enrollment starts unless it names a step.';
COMMENT ON COLUMN sequencer.sequences.timezone IS 'IANA name; the default for enrollments without a time zone of their own.';
COMMENT ON COLUMN sequencer.sequences.status IS 'paused: nothing is executed, but time passes. archived: no new enrollments; existing ones continue.';
COMMENT ON COLUMN sequencer.sequences.reentry IS 'When a subject may be enrolled again: after_end of its previous enrollment, after that and the time in reentry_after, always, or never.';
COMMENT ON COLUMN sequencer.sequences.reentry_after IS 'With the reentry policy after: how long after the end of its previous enrollment a subject may be enrolled again. One unit: months, days, or a time.';
COMMENT ON COLUMN sequencer.sequences.lookup IS 'The source of external data about subjects: an endpoint of the settings, an installed Python function, or an SQL function such as app.plans.';
COMMENT ON COLUMN sequencer.sequences.recheck IS 'How often goals and conditions that read external data are evaluated.';
COMMENT ON COLUMN sequencer.sequences.time_window IS 'When its side effects may begin, as in the key window of a file; NULL: at any time. The name differs because WINDOW is a reserved word.';
COMMENT ON COLUMN sequencer.sequences.locale IS 'The path of the language of a subject, such as data.language, which chooses among the texts of messages; NULL: data.locale.';
COMMENT ON COLUMN sequencer.sequences.partials IS 'Templates by name, which the messages of the sequence use as {{> name}}.';
COMMENT ON COLUMN sequencer.sequences.topic IS 'What its side effects are about, unless their configs have a topic. Suppressions of this topic apply to them.';
COMMENT ON COLUMN sequencer.sequences.enroll IS 'Enrolls the subjects that a view or function returns, on a schedule: {"from": "app.overdue", "schedule": "0 9 * * 1-5", "at_most": 1000}; instead of schedule, "every": {"amount": 1, "unit": "hours"}.';
COMMENT ON COLUMN sequencer.sequences.brake_at_most IS 'If more side effects than this would begin in brake_per, the sequence is paused instead.';
COMMENT ON COLUMN sequencer.sequences.brake_per IS 'The period of the brake, in hours to seconds.';
COMMENT ON COLUMN sequencer.sequences.apply_brake IS 'Set by apply --brake: a brake of this number of side effects in an hour, which replaces the other until apply_brake_until.';
COMMENT ON COLUMN sequencer.sequences.revision IS 'A new number for each transaction that changes the sequence or its steps; unique across sequences.';
COMMENT ON COLUMN sequencer.sequences.from_file IS 'Whether it was applied from a file: apply --prune archives it when it is no longer in any file.';
COMMENT ON COLUMN sequencer.sequences.resumed_at IS 'When it was last resumed after a pause: nothing in it was due before.';

CREATE TABLE sequencer.steps (
    sequence      text COLLATE "C" NOT NULL
                  REFERENCES sequencer.sequences ON UPDATE CASCADE ON DELETE CASCADE,
    name          text COLLATE "C" NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 200),
    position      bigint NOT NULL GENERATED BY DEFAULT AS IDENTITY,
    type          text NOT NULL CHECK (octet_length(type) BETWEEN 1 AND 200),
    config        jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(config) = 'object'),
    next_step     text,
    alt_next_step text,
    problem       text,
    reschedule_from bigint,
    reschedule_again boolean NOT NULL DEFAULT false,
    seed          text CHECK (octet_length(seed) BETWEEN 1 AND 1000),
    original_id   text,
    PRIMARY KEY (sequence, name),
    FOREIGN KEY (sequence, next_step) REFERENCES sequencer.steps
        ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED,
    FOREIGN KEY (sequence, alt_next_step) REFERENCES sequencer.steps
        ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED
);

-- of the types that name steps in their configs: see sequencer.named_steps
CREATE INDEX steps_naming ON sequencer.steps (sequence) WHERE type IN ('GoTo', 'Switch', 'Split');

COMMENT ON TABLE  sequencer.steps IS 'The steps of sequences: what each does, and where it leads.';
COMMENT ON COLUMN sequencer.steps.position IS 'The order in the definition; if several goals are met at once, the last wins.';
COMMENT ON COLUMN sequencer.steps.next_step IS 'Where the action next leads; NULL completes the enrollment.';
COMMENT ON COLUMN sequencer.steps.alt_next_step IS 'Where the action altNext leads; NULL completes the enrollment.';
COMMENT ON COLUMN sequencer.steps.seed IS 'For a Split: the seed that assigns subjects to branches. It is made of the original names, so that a rename reassigns no subject.';
COMMENT ON COLUMN sequencer.steps.original_id IS 'Its id in the original Sequencer, if it was imported.';
COMMENT ON COLUMN sequencer.steps.problem IS 'Why this step cannot be executed; written by the daemon.';
COMMENT ON COLUMN sequencer.steps.reschedule_from IS 'Set when the step has changed, or by a request by NOTIFY: waiting enrollments with this id or a greater one are still to be evaluated.';
COMMENT ON COLUMN sequencer.steps.reschedule_again IS 'Whether another request arrived meanwhile: all waiting enrollments are then evaluated once more.';

CREATE TABLE sequencer.holidays (
    calendar text COLLATE "C" NOT NULL CHECK (octet_length(calendar) BETWEEN 1 AND 200),
    day      date NOT NULL CHECK (day BETWEEN '0001-01-01' AND '9999-12-31'),
    name     text,
    PRIMARY KEY (calendar, day)
);

COMMENT ON TABLE  sequencer.holidays IS 'Days on which windows with this calendar do not open, and which are not business days in it.';
COMMENT ON COLUMN sequencer.holidays.calendar IS 'The name that windows and business days use, such as DE.';

CREATE TABLE sequencer.revisions (
    sequence text COLLATE "C" NOT NULL, -- no foreign key: revisions outlive a deleted sequence
    revision integer NOT NULL,
    at       timestamptz NOT NULL,
    by       text NOT NULL,
    reason   text,
    document jsonb NOT NULL,
    PRIMARY KEY (sequence, revision)
);

COMMENT ON TABLE  sequencer.revisions IS 'All definitions, past and present: one for each transaction that changed a sequence.';
COMMENT ON COLUMN sequencer.revisions.by IS 'The database user that made the change.';
COMMENT ON COLUMN sequencer.revisions.reason IS 'Why, from SET LOCAL sequencer.reason; commands put the user and host before it.';
COMMENT ON COLUMN sequencer.revisions.document IS 'The sequence and its steps, with the keys of a definition file.';


-- enrollments -----------------------------------------------------------------------------------

CREATE TABLE sequencer.enrollments (
    -- Each update adds an entry to the index: without room for it, each page of what was inserted in bulk is
    -- searched for dead entries, of which it has none yet, and split.
    id         bigint PRIMARY KEY WITH (fillfactor = 70) GENERATED BY DEFAULT AS IDENTITY,
    sequence   text COLLATE "C" NOT NULL,
    step       text COLLATE "C" NOT NULL,
    subject    text COLLATE "C" NOT NULL CHECK (octet_length(subject) BETWEEN 1 AND 1000),
    data       jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(data) = 'object'),
    timezone   text,
    status     text NOT NULL DEFAULT 'active'
               CHECK (status IN ('active', 'completed', 'cancelled', 'failed')),
    wake_at    timestamptz DEFAULT now()
               CHECK (wake_at BETWEEN '1900-01-01Z' AND '9999-01-01Z' OR wake_at = 'infinity'),
    entered_at timestamptz CHECK (entered_at BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    visit      integer NOT NULL DEFAULT 1 CHECK (visit BETWEEN 1 AND 1000000000),
    attempt    integer NOT NULL DEFAULT 0 CHECK (attempt BETWEEN 0 AND 1000000000),
    leases     integer NOT NULL DEFAULT 0 CHECK (leases BETWEEN 0 AND 1000000000),
    goals_met  text[] NOT NULL DEFAULT '{}',
    goals_elsewhere jsonb CHECK (jsonb_typeof(goals_elsewhere) = 'object'),
    executed   text[] NOT NULL DEFAULT '{}',
    leased_by  text,
    expires_at timestamptz,
    waits_until timestamptz,
    retry_at   timestamptz CHECK (retry_at BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    failure    text,
    last_error text,
    reentry    text NOT NULL CHECK (reentry IN ('after_end', 'after', 'always', 'never')),
    created_at timestamptz NOT NULL DEFAULT now()
               CHECK (created_at BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    ended_at   timestamptz,
    tag        uuid NOT NULL DEFAULT gen_random_uuid(),
    original_id text CHECK (octet_length(original_id) BETWEEN 1 AND 1000),
    entry      bigint NOT NULL GENERATED ALWAYS AS (
                   CASE WHEN reentry IN ('never', 'after') OR reentry = 'after_end' AND status = 'active'
                        THEN 0 ELSE id END) STORED,
    CONSTRAINT active_has_wake_at CHECK ((status = 'active') = (wake_at IS NOT NULL)),
    CONSTRAINT ended_has_ended_at CHECK ((status = 'active') = (ended_at IS NULL)),
    -- starts with the subject, so that it also finds enrollments by subject
    CONSTRAINT one_entry UNIQUE (subject, sequence, entry)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);

CREATE INDEX enrollments_due ON sequencer.enrollments (sequence, step, wake_at)
    WHERE status = 'active';
-- of enrollments that wait for a runner that is down or full
CREATE INDEX enrollments_expiring ON sequencer.enrollments (sequence, step, expires_at)
    WHERE status = 'active' AND expires_at IS NOT NULL;
CREATE INDEX enrollments_failed ON sequencer.enrollments (sequence, step, failure)
    WHERE status = 'failed';
-- for another import from the original
CREATE INDEX enrollments_original ON sequencer.enrollments (original_id)
    WHERE original_id IS NOT NULL;
-- for delete_ended
CREATE INDEX enrollments_ended ON sequencer.enrollments (ended_at)
    WHERE ended_at IS NOT NULL AND reentry NOT IN ('never', 'after');
CREATE INDEX enrollments_ended_reentry_after ON sequencer.enrollments (sequence, ended_at)
    WHERE ended_at IS NOT NULL AND reentry = 'after';

COMMENT ON TABLE  sequencer.enrollments IS 'Journeys of subjects through sequences: where each is, since when, and when it wakes.';
COMMENT ON COLUMN sequencer.enrollments.id IS 'Unique in this schema; never used again.';
COMMENT ON COLUMN sequencer.enrollments.sequence IS 'The name of its sequence.';
COMMENT ON COLUMN sequencer.enrollments.step IS 'The name of the step where it is, or where it ended.';
COMMENT ON COLUMN sequencer.enrollments.subject IS 'What is enrolled: the id of a customer, an invoice, a device.';
COMMENT ON COLUMN sequencer.enrollments.data IS 'What conditions and templates read. A change wakes the enrollment immediately.';
COMMENT ON COLUMN sequencer.enrollments.timezone IS 'IANA name: the time zone of the subject; NULL: that of the sequence.';
COMMENT ON COLUMN sequencer.enrollments.status IS 'active, or how it ended: completed, failed or cancelled.';
COMMENT ON COLUMN sequencer.enrollments.wake_at IS 'When it is next evaluated; infinity: only when something changes. On insert: when it starts.';
COMMENT ON COLUMN sequencer.enrollments.entered_at IS 'Since when it has been at its step; NULL until it has started.';
COMMENT ON COLUMN sequencer.enrollments.visit IS 'The number of the present visit; each visit is one stay at one step.';
COMMENT ON COLUMN sequencer.enrollments.attempt IS 'How many times the side effect of this visit has been started.';
COMMENT ON COLUMN sequencer.enrollments.leases IS 'The number of the latest lease in this visit, unique within the daemon that holds it; identifies results of earlier leases.';
COMMENT ON COLUMN sequencer.enrollments.goals_met IS 'The goals of its sequence that it has met: each moves it once. A goal with repeat: true is removed when its condition is no longer true.';
COMMENT ON COLUMN sequencer.enrollments.goals_elsewhere IS 'The goals that it has met in sequences that it has left, by sequence, in case it returns.';
COMMENT ON COLUMN sequencer.enrollments.executed IS 'The side effects, as sequence/step, executed since it last waited: reaching one of them again is a loop.';
COMMENT ON COLUMN sequencer.enrollments.leased_by IS 'The daemon that is executing the side effect; wake_at is then the end of its lease.';
COMMENT ON COLUMN sequencer.enrollments.retry_at IS 'The side effect is not retried before this time.';
COMMENT ON COLUMN sequencer.enrollments.expires_at IS 'The side effect is not started after this time; -infinity: unknown, because the data has changed.';
COMMENT ON COLUMN sequencer.enrollments.waits_until IS 'When its wait ends, if it is evaluated earlier, at wake_at, because external data may have changed. NULL: at wake_at.';
COMMENT ON COLUMN sequencer.enrollments.failure IS 'Why it failed, as a code: error, invalid_step, bad_data, loop, unsatisfiable, outcome_unknown, already_enrolled, archived.';
COMMENT ON COLUMN sequencer.enrollments.last_error IS 'The last error, as a sentence.';
COMMENT ON COLUMN sequencer.enrollments.created_at IS 'When the subject was enrolled.';
COMMENT ON COLUMN sequencer.enrollments.ended_at IS 'When it ended; NULL while it is active.';
COMMENT ON COLUMN sequencer.enrollments.entry IS '0 if the reentry policy allows the subject no second such row, otherwise a unique number.';
COMMENT ON COLUMN sequencer.enrollments.tag IS 'Random: makes idempotency keys unique across databases, in which ids repeat.';
COMMENT ON COLUMN sequencer.enrollments.original_id IS 'Its id in the original Sequencer, if it was imported.';
COMMENT ON COLUMN sequencer.enrollments.reentry IS 'The reentry policy of its sequence; after_end for an ended enrollment that no longer prevents another.';


-- history ---------------------------------------------------------------------------------------

CREATE TABLE sequencer.events (
    enrollment_id bigint NOT NULL,
    at            timestamptz NOT NULL,
    sequence      text NOT NULL,
    step          text NOT NULL,
    visit         integer NOT NULL,
    action        text NOT NULL,
    message       text,
    revision      integer,
    seconds_at_step real
) PARTITION BY RANGE (at);

CREATE INDEX events_of_enrollment ON sequencer.events (enrollment_id, at);
-- for the view overview and the arms of funnels
CREATE INDEX events_of_branches ON sequencer.events (sequence, step, message)
    INCLUDE (enrollment_id, visit, at) WHERE action = 'branch';
-- for funnels: visits that ended, but whose enrollment was resumed
CREATE INDEX events_of_failures ON sequencer.events (sequence, at) WHERE action IN ('failed', 'cancelled');
CREATE INDEX events_in_time ON sequencer.events USING brin (at);

COMMENT ON TABLE  sequencer.events IS 'What happened to enrollments.';
COMMENT ON COLUMN sequencer.events.action IS 'enrolled; next, altNext, noop; suppressed, expired, limited; goal; jump; branch; retry, lease_expired, stale_result; warning; completed, failed, cancelled, resumed, moved, retargeted, reevaluated, edited, created.';
COMMENT ON COLUMN sequencer.events.visit IS 'The visit of the enrollment in which it happened.';
COMMENT ON COLUMN sequencer.events.message IS 'Details, such as the message of a runner, an error, the branch, or the user and the reason of a manual change.';
COMMENT ON COLUMN sequencer.events.revision IS 'The revision of the definition in effect; for the result of a side effect, the one in effect when it was started.';
COMMENT ON COLUMN sequencer.events.seconds_at_step IS 'How long the enrollment had been at the step.';

-- A daemon records present events only: it cannot rewrite history.
CREATE FUNCTION sequencer.check_event() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE insufficient_privilege USING
        MESSAGE = format('permission denied: an event of %s cannot be recorded now', NEW.at),
        SCHEMA = 'sequencer', TABLE = 'events', COLUMN = 'at',
        HINT = 'If a daemon reports this, its clock and the database''s differ by more than a day.';
END $$;

-- 24 hours instead of a day, for which the time zone would be looked up for each row.
CREATE TRIGGER of_today BEFORE INSERT ON sequencer.events
    FOR EACH ROW WHEN (NEW.at NOT BETWEEN now() - interval '24 hours' AND now() + interval '24 hours'
        AND NOT has_table_privilege('sequencer.events'::regclass, 'INSERT'))
    EXECUTE FUNCTION sequencer.check_event();

-- The table has no key; without this, a publication for all tables would make deletes fail.
ALTER TABLE sequencer.events REPLICA IDENTITY FULL;

-- Rows of months without a partition. While a daemon runs, there are none.
CREATE TABLE sequencer.events_other PARTITION OF sequencer.events DEFAULT;
ALTER TABLE sequencer.events_other REPLICA IDENTITY FULL;

-- Partitions are attached and dropped while daemons write. Waiting for a lock on the history blocks all
-- other writers, so the wait is short; if it fails, it is retried later.
CREATE FUNCTION sequencer.add_event_partitions(ahead integer DEFAULT 3) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    SET timezone = 'UTC' SET lock_timeout = '200ms' AS $$
DECLARE
    month timestamptz;
    name text;
BEGIN
    FOR month IN SELECT generate_series(
        date_trunc('month', now()), now() + make_interval(months => least(ahead, 24)), '1 month')
    LOOP
        name := 'events_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass('sequencer.' || name) IS NOT NULL;
        EXECUTE format('CREATE TABLE sequencer.%I (LIKE sequencer.events INCLUDING ALL)', name);
        EXECUTE format('ALTER TABLE sequencer.%I REPLICA IDENTITY FULL', name);
        LOCK TABLE sequencer.events_other IN ACCESS EXCLUSIVE MODE;
        -- rows from a time when no partitions were created
        IF EXISTS (SELECT FROM sequencer.events_other
                    WHERE at >= month AND at < month + interval '1 month') THEN
            EXECUTE format(
                'WITH moved AS (
                     DELETE FROM sequencer.events_other WHERE at >= %2$L AND at < %3$L RETURNING *)
                 INSERT INTO sequencer.%1$I SELECT * FROM moved',
                name, month, month + interval '1 month');
        END IF;
        EXECUTE format(
            'ALTER TABLE sequencer.events ATTACH PARTITION sequencer.%I FOR VALUES FROM (%L) TO (%L)',
            name, month, month + interval '1 month');
    END LOOP;
END $$;

COMMENT ON FUNCTION sequencer.add_event_partitions IS 'Create the partitions of this month and the given number of months ahead.';

SELECT sequencer.add_event_partitions();

-- One partition per call. The right to call it is the right to drop past months of the history only.
CREATE FUNCTION sequencer.drop_event_partition(before timestamptz) RETURNS text
LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    SET timezone = 'UTC' SET lock_timeout = '200ms' AS $$
DECLARE
    past timestamptz := least(before, date_trunc('month', now()));
    oldest text;
BEGIN
    SELECT c.relname INTO oldest
      FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'sequencer.events'::regclass
       AND to_timestamp(substring(c.relname FROM '^events_(\d{4}_\d\d)$'), 'YYYY_MM')
           + interval '1 month' <= past
     ORDER BY c.relname LIMIT 1;
    IF FOUND THEN
        EXECUTE format('DROP TABLE sequencer.%I', oldest);
        RETURN oldest;
    END IF;
    IF NOT EXISTS (SELECT FROM sequencer.events_other WHERE at < past) THEN
        RETURN NULL;
    END IF;
    DELETE FROM sequencer.events_other WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM sequencer.events_other WHERE at < past LIMIT 10000));
    RETURN 'events_other';
END $$;

COMMENT ON FUNCTION sequencer.drop_event_partition IS 'Drop the oldest month of the history if it ended before the given time. Return its name, or NULL if there is none.';

-- While a snapshot is held open, the index keeps the entries of what is deleted. So a call returns where
-- it ended, for the next one: a time until the first table is done, then a sequence as well.
CREATE FUNCTION sequencer.delete_ended(
    before timestamptz, batch integer, after_sequence text DEFAULT '',
    since timestamptz DEFAULT '-infinity', OUT deleted bigint, OUT next_sequence text,
    OUT next_since timestamptz)
LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    s record;
    more bigint;
BEGIN
    deleted := 0;
    next_sequence := after_sequence;
    next_since := since;
    IF next_sequence = '' THEN
        WITH gone AS (
            DELETE FROM sequencer.enrollments WHERE id = ANY (ARRAY(
                SELECT id FROM sequencer.enrollments
                 WHERE ended_at >= since AND ended_at < least(before, now())
                   AND reentry NOT IN ('never', 'after')
                 ORDER BY ended_at LIMIT batch FOR UPDATE SKIP LOCKED))
            RETURNING ended_at
        )
        SELECT count(*), coalesce(max(ended_at), since) INTO deleted, next_since FROM gone;
        IF deleted >= batch THEN
            RETURN;
        END IF;
        next_since := '-infinity';
    END IF;
    FOR s IN SELECT q.name, q.timezone, q.reentry_after FROM sequencer.sequences AS q
              WHERE q.reentry = 'after' AND q.name >= next_sequence ORDER BY q.name
    LOOP
        IF s.name <> next_sequence THEN
            next_sequence := s.name;
            next_since := '-infinity';
        END IF;
        WITH gone AS (
            DELETE FROM sequencer.enrollments WHERE id = ANY (ARRAY(
                SELECT id FROM sequencer.enrollments
                 WHERE sequence = s.name AND reentry = 'after' AND ended_at >= next_since
                   AND ended_at < least(before, now())
                   AND ended_at < (now() AT TIME ZONE s.timezone - s.reentry_after)
                       AT TIME ZONE s.timezone
                 ORDER BY ended_at LIMIT batch - deleted FOR UPDATE SKIP LOCKED))
            RETURNING ended_at
        )
        SELECT count(*), coalesce(max(ended_at), next_since) INTO more, next_since FROM gone;
        deleted := deleted + more;
        EXIT WHEN deleted >= batch;
    END LOOP;
END $$;

COMMENT ON FUNCTION sequencer.delete_ended IS 'Delete a batch of the enrollments that ended before the given time, the oldest first. Return how many, and the arguments with which the next call continues. Enrollments that prevent another one, by the reentry policy never or after, are kept.';

-- activity --------------------------------------------------------------------------------------

-- Counted by a daemon from the history, an hour at a time. Counting an hour again sets the same numbers,
-- or greater ones if events were committed late; so no event counts twice, and events that retention has
-- deleted since then remain counted.
CREATE TABLE sequencer.activity (
    sequence text COLLATE "C" NOT NULL,
    hour     timestamptz NOT NULL,
    step     text COLLATE "C" NOT NULL,
    action   text COLLATE "C" NOT NULL,
    times    bigint NOT NULL,
    PRIMARY KEY (sequence, hour, step, action)
);
CREATE INDEX activity_in_time ON sequencer.activity USING brin (hour);

COMMENT ON TABLE  sequencer.activity IS 'Counts of events by step and hour: a summary of the history, kept for 400 days.';
COMMENT ON COLUMN sequencer.activity.hour IS 'When the hour began, in UTC.';
COMMENT ON COLUMN sequencer.activity.action IS 'As in events; for a branch followed by its name, for a goal by the name of its step.';

CREATE TABLE sequencer.activity_progress (
    after   interval PRIMARY KEY,
    "until" timestamptz NOT NULL
);

COMMENT ON TABLE  sequencer.activity_progress IS 'Up to when the history has been counted in activity: each hour soon after its end, and again when no daemon can add to it.';
COMMENT ON COLUMN sequencer.activity_progress.after IS 'How long after its end an hour is counted.';

-- A claim of late enrollments adds a row, in its own transaction, so each is counted once. Past hours are
-- summed up; until then their rows are many.
CREATE TABLE sequencer.lateness (
    sequence text COLLATE "C" NOT NULL,
    step     text COLLATE "C" NOT NULL,
    at       timestamptz NOT NULL,
    times    bigint NOT NULL,
    over_minute bigint NOT NULL,
    over_ten_minutes bigint NOT NULL,
    longest  real NOT NULL,
    is_hour  boolean NOT NULL DEFAULT false
);
-- without a key, a publication for all tables would make deletes fail
ALTER TABLE sequencer.lateness REPLICA IDENTITY FULL;
CREATE INDEX lateness_of_sequence ON sequencer.lateness (sequence, at);
CREATE INDEX lateness_of_claims ON sequencer.lateness (at) WHERE NOT is_hour;

COMMENT ON TABLE  sequencer.lateness IS 'How many enrollments began their step more than ten seconds after they were due, and how late; kept for 400 days.';
COMMENT ON COLUMN sequencer.lateness.at IS 'When they began; for the sum of an hour, when that hour began.';
COMMENT ON COLUMN sequencer.lateness.over_minute IS 'How many of these were more than a minute late.';
COMMENT ON COLUMN sequencer.lateness.over_ten_minutes IS 'How many of these were more than ten minutes late.';
COMMENT ON COLUMN sequencer.lateness.longest IS 'How late the latest of them began, in seconds.';


CREATE TABLE sequencer.topics (
    name        text COLLATE "C" PRIMARY KEY CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$'),
    title       text NOT NULL CHECK (octet_length(title) BETWEEN 1 AND 1000),
    description text CHECK (octet_length(description) <= 10000),
    frequency_limit jsonb CHECK (jsonb_typeof(frequency_limit) = 'object')
);

COMMENT ON TABLE  sequencer.topics IS 'What messages are about, in words for their recipients. A topic that is not listed works as well, under its name.';
COMMENT ON COLUMN sequencer.topics.name IS 'As in the key topic of a step or a sequence.';
COMMENT ON COLUMN sequencer.topics.title IS 'What recipients see, such as Offers and news.';
COMMENT ON COLUMN sequencer.topics.frequency_limit IS 'How often side effects of the topic may begin for a subject, in all sequences: {"at_most": 3, "per": {"days": 7}, "then": "wait"}, with the keys of the limit of a step except topic. The name differs because LIMIT is a reserved word.';

-- Limits are part of the definitions that use their topic: a change is a new revision of those, and the
-- enrollments that wait at their side effects are rescheduled. Nothing of a topic waits at the other
-- steps, of which there may be many enrollments.
CREATE FUNCTION sequencer.follow_topics() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    changed text[];
BEGIN
    IF TG_OP = 'INSERT' THEN
        SELECT array_agg(name) INTO changed FROM new_topics WHERE frequency_limit IS NOT NULL;
    ELSIF TG_OP = 'DELETE' THEN
        SELECT array_agg(name) INTO changed FROM old_topics WHERE frequency_limit IS NOT NULL;
    ELSE
        WITH before AS (SELECT name, frequency_limit FROM old_topics WHERE frequency_limit IS NOT NULL),
             after AS (SELECT name, frequency_limit FROM new_topics WHERE frequency_limit IS NOT NULL),
             difference AS ((TABLE before EXCEPT TABLE after) UNION ALL (TABLE after EXCEPT TABLE before))
        SELECT array_agg(name) INTO changed FROM difference;
    END IF;
    IF changed IS NULL THEN
        RETURN NULL;
    END IF;
    WITH concerned AS (
        UPDATE sequencer.steps AS s SET reschedule_from = 0 FROM sequencer.sequences AS q
         WHERE q.name = s.sequence
           AND CASE WHEN s.config ? 'topic' THEN s.config->>'topic' ELSE q.topic END = ANY (changed)
           AND s.type <> ALL (sequencer.instant_types())
        RETURNING s.sequence
    )
    UPDATE sequencer.sequences SET revision = revision
     WHERE name IN (SELECT sequence FROM concerned);
    RETURN NULL;
END $$;

-- The same as the types in sequencerd/core/step_types that have no side effect.
CREATE FUNCTION sequencer.instant_types() RETURNS text[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT ARRAY['GoTo', 'Conditional', 'Switch', 'Goal', 'Split', 'WaitForDuration', 'WaitForDate',
        'WaitForDateComparison', 'WaitForCondition', 'WaitForWindow', 'UpdateData', 'Enroll',
        'Cancel', 'Collect']
$$;

CREATE TRIGGER follow_insert AFTER INSERT ON sequencer.topics
    REFERENCING NEW TABLE AS new_topics
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.follow_topics();
CREATE TRIGGER follow_update AFTER UPDATE ON sequencer.topics
    REFERENCING OLD TABLE AS old_topics NEW TABLE AS new_topics
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.follow_topics();
CREATE TRIGGER follow_delete AFTER DELETE ON sequencer.topics
    REFERENCING OLD TABLE AS old_topics
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.follow_topics();

CREATE TABLE sequencer.suppressions (
    channel    text NOT NULL CHECK (channel ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    address    text COLLATE "C" NOT NULL CHECK (octet_length(address) BETWEEN 1 AND 1000),
    topic      text COLLATE "C" NOT NULL DEFAULT '*'
               CHECK (topic = '*' OR topic ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$'),
    reason     text,
    source     text NOT NULL DEFAULT 'application' CHECK (octet_length(source) BETWEEN 1 AND 100),
    created_at timestamptz NOT NULL DEFAULT now()
               CHECK (created_at BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    PRIMARY KEY (channel, address, topic)
);

COMMENT ON TABLE  sequencer.suppressions IS 'Addresses and subjects to which no messages are sent. E-mail addresses are stored in lower case, phone numbers without separators, addresses of other channels as they are.';
COMMENT ON COLUMN sequencer.suppressions.channel IS 'email, sms, or the channel that steps of a custom runner name, such as push.';
COMMENT ON COLUMN sequencer.suppressions.topic IS 'Stops the messages of this topic; * stops all.';
COMMENT ON COLUMN sequencer.suppressions.source IS 'What added the entry: application, console, or a daemon: refused, bounce, complaint, stop, unsubscribe.';

-- runners/sms/numbers.py normalises the recipient's number in the same way: it removes blanks, dashes,
-- invisible characters, and the zero of national calls as in +49 (0)151.
CREATE FUNCTION sequencer.normalise_suppression() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    separators CONSTANT text := '['
        '\s\u00a0\u00ad\u058a\u05be\u061c\u1680\u1806\u180e\u2000-\u2015\u2028-\u202f\u2043\u2044'
        '\u205f-\u206f\u2212\u2215\u2e17\u2e1a\u2e3a\u2e3b\u3000\u301c\u3030\u30a0\u30fc\ufe31\ufe32'
        '\ufe58\ufe63\ufeff\uff0d().\/-]';
    channel text;
    number text;
BEGIN
    NEW.topic := coalesce(NEW.topic, '*');
    NEW.source := coalesce(NEW.source, 'application');
    NEW.created_at := coalesce(NEW.created_at, now());
    NEW.channel := lower(btrim(NEW.channel));
    NEW.address := btrim(NEW.address, E' \t\r\n\u00a0\u3000');
    IF NEW.channel NOT IN ('email', 'sms') THEN
        RETURN NEW;
    END IF;
    NEW.address := lower(NEW.address);
    IF NEW.channel = 'email' AND NEW.address ~ '<[^<>@]+@[^<>@]+>$' THEN -- Ada <a@x.org>
        NEW.address := btrim(substring(NEW.address FROM '<([^<>]+)>$'));
    END IF;
    IF NEW.channel = 'sms' THEN
        number := translate(NEW.address, '０１２３４５６７８９＋（）．／', '0123456789+()./');
        number := regexp_replace(number, '^' || separators || '+', '');
        channel := coalesce(substring(number FROM '^[a-z][a-z0-9.+-]*:'), '');
        number := regexp_replace(substr(number, length(channel) + 1), '^' || separators || '+', '');
        IF number ~ ('^([+0-9]|' || separators || ')+$') THEN
            number := regexp_replace(number, '^(\+(?!(?:39|378|379|225|241|242)' || separators
                || ')[1-9][0-9]{0,2})' || separators || '*\(\s*0\s*\)', '\1');
            NEW.address := CASE WHEN channel = 'tel:' THEN '' ELSE channel END
                || regexp_replace(number, separators, '', 'g');
        END IF;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER normalise_suppression BEFORE INSERT OR UPDATE OF channel, address, topic, source, created_at
    ON sequencer.suppressions FOR EACH ROW EXECUTE FUNCTION sequencer.normalise_suppression();

CREATE TABLE sequencer.removed_suppressions (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    removed_at timestamptz NOT NULL DEFAULT now(),
    channel    text NOT NULL,
    address    text COLLATE "C" NOT NULL,
    topic      text COLLATE "C" NOT NULL,
    source     text NOT NULL,
    created_at timestamptz NOT NULL,
    reason     text
);

COMMENT ON TABLE  sequencer.removed_suppressions IS 'Entries of suppressions that were removed, by whatever means.';
COMMENT ON COLUMN sequencer.removed_suppressions.address IS 'The hash of the address, as computed by suppression_hash(), so that there is nothing to forget.';
COMMENT ON COLUMN sequencer.removed_suppressions.source IS 'The source of the removed entry; created_at is the time of that entry.';
COMMENT ON COLUMN sequencer.removed_suppressions.reason IS 'The database user that removed it, and the reason from SET LOCAL sequencer.reason, which names an operator or quotes a recipient.';

-- An address that is still suppressed by its hash, as after forget(), or by an entry with other values, was not
-- removed.
CREATE FUNCTION sequencer.record_removed_suppressions() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old record;
BEGIN
    -- one by one, since Citus joins no transition table to a table
    FOR old IN SELECT o.channel, o.address, o.topic, o.source, o.created_at,
                      CASE WHEN o.address ~ '^sha256:[0-9a-f]{64}$' THEN o.address
                           ELSE sequencer.suppression_hash(o.address) END AS hash
                 FROM old_suppressions AS o
    LOOP
        IF NOT EXISTS (SELECT FROM sequencer.suppressions AS s
                        WHERE s.channel = old.channel AND s.address IN (old.address, old.hash)
                          AND s.topic = old.topic) THEN
            INSERT INTO sequencer.removed_suppressions (channel, address, topic, source, created_at, reason)
            VALUES (old.channel, old.hash, old.topic, old.source, old.created_at, sequencer.changed_by());
        END IF;
    END LOOP;
    RETURN NULL;
END $$;

CREATE FUNCTION sequencer.record_truncated_suppressions() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO sequencer.removed_suppressions (channel, address, topic, source, created_at, reason)
    SELECT s.channel,
           CASE WHEN s.address ~ '^sha256:[0-9a-f]{64}$' THEN s.address
                ELSE sequencer.suppression_hash(s.address) END,
           s.topic, s.source, s.created_at, sequencer.changed_by()
      FROM sequencer.suppressions AS s;
    RETURN NULL;
END $$;

CREATE TRIGGER record_truncate BEFORE TRUNCATE ON sequencer.suppressions
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.record_truncated_suppressions();
CREATE TRIGGER record_update AFTER UPDATE ON sequencer.suppressions
    REFERENCING OLD TABLE AS old_suppressions
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.record_removed_suppressions();
CREATE TRIGGER record_delete AFTER DELETE ON sequencer.suppressions
    REFERENCING OLD TABLE AS old_suppressions
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.record_removed_suppressions();


-- limits ----------------------------------------------------------------------------------------

-- One row for what is counted together, so that its lock lets one transaction count at a time.
CREATE TABLE sequencer.reservations (
    key          bytea PRIMARY KEY,
    topic        text NOT NULL,
    at           timestamptz[] NOT NULL DEFAULT '{}',
    enrollments  bigint[] NOT NULL DEFAULT '{}',
    visits       integer[] NOT NULL DEFAULT '{}',
    longest      interval NOT NULL DEFAULT '0',
    counts_until timestamptz NOT NULL
);

COMMENT ON TABLE  sequencer.reservations IS 'Side effects with a limit that have begun recently, by what their limits count together.';
COMMENT ON COLUMN sequencer.reservations.key IS 'A hash of the topic and the key of the limit, such as the subject.';
COMMENT ON COLUMN sequencer.reservations.at IS 'When each began; the other lists have the enrollment and visit of each.';
COMMENT ON COLUMN sequencer.reservations.longest IS 'The longest period of the limits that count them.';
COMMENT ON COLUMN sequencer.reservations.counts_until IS 'When the last of them is outside of that period.';

-- Entries with the same number are reserved together or not at all. All rows are locked first, in the
-- order of their keys, so that no two transactions wait for each other. What shares no key with another
-- number is reserved at once, the rest one number at a time.
CREATE FUNCTION sequencer.reserve(
    numbers integer[], keys bytea[], topics text[], enrollments bigint[], visits integer[],
    at_most integer[], periods interval[], at timestamptz
) RETURNS TABLE (entry bigint, free_at timestamptz)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    turn record;
BEGIN
    INSERT INTO sequencer.reservations AS r (key, topic, longest, counts_until)
    SELECT w.key, min(w.topic), max(w.period), reserve.at + max(w.period)
      FROM unnest(keys, topics, periods) AS w (key, topic, period) GROUP BY w.key ORDER BY w.key
    ON CONFLICT ON CONSTRAINT reservations_pkey
    DO UPDATE SET longest = greatest(r.longest, excluded.longest),
                  counts_until = greatest(r.counts_until, excluded.counts_until);
    FOR turn IN
        WITH wanted AS (
            SELECT * FROM unnest(numbers, keys, enrollments, visits, at_most, periods)
                   WITH ORDINALITY AS w (number, key, enrollment, visit, at_most, period, entry)
        ), of_keys AS (
            SELECT w.number, min(w.number) OVER of_key <> max(w.number) OVER of_key AS is_shared
              FROM wanted AS w WINDOW of_key AS (PARTITION BY w.key)
        ), sharing AS (
            SELECT DISTINCT k.number FROM of_keys AS k WHERE k.is_shared
        )
        SELECT array_agg(w.number) AS numbers, array_agg(w.key) AS keys,
               array_agg(w.enrollment) AS enrollments, array_agg(w.visit) AS visits,
               array_agg(w.at_most) AS at_most, array_agg(w.period) AS periods,
               array_agg(w.entry) AS entries
          FROM wanted AS w LEFT JOIN sharing AS s ON s.number = w.number
         GROUP BY s.number ORDER BY s.number
    LOOP
        RETURN QUERY
        WITH present AS (
            -- the daemons' clocks may differ by a little: time never goes back for a row
            SELECT w.*, r.longest, r.at, r.enrollments, r.visits,
                   greatest(reserve.at, (SELECT max(o.at) FROM unnest(r.at) AS o (at))) AS now
              FROM unnest(turn.numbers, turn.keys, turn.enrollments, turn.visits, turn.at_most,
                          turn.periods, turn.entries)
                   AS w (number, key, enrollment, visit, at_most, period, entry)
              JOIN sequencer.reservations AS r ON r.key = w.key
        ), state AS (
            -- a retry gives its former place back for the new one
            SELECT p.number, p.key, p.enrollment, p.visit, p.at_most, p.period, p.entry, p.now,
                   coalesce(o.at, '{}') AS at, coalesce(o.enrollments, '{}') AS enrollments,
                   coalesce(o.visits, '{}') AS visits, coalesce(o.counted, '{}') AS counted
              FROM present AS p CROSS JOIN LATERAL (
                SELECT array_agg(o.at ORDER BY o.at) AS at,
                       array_agg(o.enrollment ORDER BY o.at) AS enrollments,
                       array_agg(o.visit ORDER BY o.at) AS visits,
                       array_agg(o.at ORDER BY o.at) FILTER (WHERE o.at > p.now - p.period) AS counted
                  FROM unnest(p.at, p.enrollments, p.visits) AS o (at, enrollment, visit)
                 WHERE o.at > p.now - p.longest - interval '1 minute'
                   AND (o.enrollment, o.visit) <> (p.enrollment, p.visit)) AS o
        ), without_room AS (
            SELECT s.number, s.entry,
                   s.counted[cardinality(s.counted) - s.at_most + 1] + s.period AS free_at
              FROM state AS s WHERE cardinality(s.counted) >= s.at_most
        ), written AS (
            UPDATE sequencer.reservations AS r
               SET at = s.at || CASE WHEN s.at_most IS NULL THEN '{}' ELSE ARRAY[s.now] END,
                   enrollments = s.enrollments
                       || CASE WHEN s.at_most IS NULL THEN '{}' ELSE ARRAY[s.enrollment] END,
                   visits = s.visits || CASE WHEN s.at_most IS NULL THEN '{}' ELSE ARRAY[s.visit] END
              FROM state AS s
             WHERE r.key = s.key AND s.number NOT IN (SELECT f.number FROM without_room AS f)
        )
        SELECT f.entry, f.free_at FROM without_room AS f;
    END LOOP;
END $$;

COMMENT ON FUNCTION sequencer.reserve IS 'Reserve places under limits until the end of their periods, in the order given; without at_most, give one back. Return the entries that found none, and when there will be one.';


-- One row for each runner with the setting per_second. Its lock lets one daemon take permits at a time.
CREATE TABLE sequencer.rates (
    runner     text COLLATE "C" PRIMARY KEY,
    per_second double precision NOT NULL,
    next_at    timestamptz NOT NULL,
    reached_at timestamptz
);

CREATE FUNCTION sequencer.take_permits(
    runner text, per_second float8, seconds float8, OUT first float8, OUT present float8
) LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known record;
    now timestamptz;
    begins timestamptz;
    reached timestamptz;
BEGIN
    LOOP
        SELECT r.next_at, r.reached_at INTO known
          FROM sequencer.rates AS r WHERE r.runner = take_permits.runner FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO sequencer.rates AS r (runner, per_second, next_at)
        VALUES (take_permits.runner, take_permits.per_second, clock_timestamp()) ON CONFLICT DO NOTHING;
    END LOOP;
    now := clock_timestamp(); -- of the time when the row is locked
    begins := least(greatest(known.next_at, now - interval '25 ms'),
                    now + greatest(interval '10 s', make_interval(secs => 100 / take_permits.per_second)));
    reached := CASE WHEN known.next_at > now + interval '100 ms' THEN now ELSE known.reached_at END;
    UPDATE sequencer.rates AS r
       SET per_second = take_permits.per_second, next_at = begins + make_interval(secs => seconds),
           reached_at = reached
     WHERE r.runner = take_permits.runner;
    first := extract(epoch FROM begins);
    present := extract(epoch FROM clock_timestamp());
END $$;

COMMENT ON FUNCTION sequencer.take_permits IS 'Take the permits of this many seconds. Return the time of the first permit, and the current time, in seconds.';

COMMENT ON TABLE  sequencer.rates IS 'The rates of runners with the setting per_second, which all daemons share. Each daemon takes permits in blocks.';
COMMENT ON COLUMN sequencer.rates.per_second IS 'The setting of the daemon that last took permits.';
COMMENT ON COLUMN sequencer.rates.next_at IS 'Until when permits are taken: the next may be used from then on.';
COMMENT ON COLUMN sequencer.rates.reached_at IS 'When calls last waited because of the rate.';


-- brakes ----------------------------------------------------------------------------------------

-- One row for each sequence with a brake, made with it, so that its lock lets one transaction count at a
-- time. Begun side effects are counted by sixtieths of the period.
CREATE TABLE sequencer.brakes (
    sequence  text COLLATE "C" PRIMARY KEY
              REFERENCES sequencer.sequences ON UPDATE CASCADE ON DELETE CASCADE,
    at        timestamptz[] NOT NULL DEFAULT '{}',
    times     integer[] NOT NULL DEFAULT '{}',
    paused_at timestamptz,
    reason    text
);

COMMENT ON TABLE  sequencer.brakes IS 'Side effects of sequences with a brake that have begun recently. Resuming a sequence starts the count again.';
COMMENT ON COLUMN sequencer.brakes.at IS 'The ends of sixtieths of the period; the column times has the number of side effects that began in each.';
COMMENT ON COLUMN sequencer.brakes.reason IS 'Why the brake has paused the sequence; NULL if it has not, or the sequence was resumed.';

CREATE FUNCTION sequencer.follow_brake() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF num_nonnulls(NEW.brake_at_most, NEW.apply_brake) = 0 AND NEW.status <> 'paused' THEN
        DELETE FROM sequencer.brakes AS b WHERE b.sequence = NEW.name;
    ELSIF num_nonnulls(NEW.brake_at_most, NEW.apply_brake) > 0 THEN
        INSERT INTO sequencer.brakes AS b (sequence) VALUES (NEW.name) ON CONFLICT DO NOTHING;
    END IF;
    IF TG_OP = 'UPDATE' AND OLD.status = 'paused' AND NEW.status <> 'paused' THEN
        UPDATE sequencer.brakes AS b SET at = '{}', times = '{}', paused_at = NULL, reason = NULL
         WHERE b.sequence = NEW.name;
    END IF;
    RETURN NULL;
END $$;

-- At the end of the transaction, so that apply waits for daemons' brakes after all enrollments that it
-- moves: daemons lock enrollments first.
CREATE CONSTRAINT TRIGGER follow_brake_of_new AFTER INSERT ON sequencer.sequences
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (num_nonnulls(NEW.brake_at_most, NEW.apply_brake) > 0)
    EXECUTE FUNCTION sequencer.follow_brake();
CREATE CONSTRAINT TRIGGER follow_brake
    AFTER UPDATE OF brake_at_most, apply_brake, status ON sequencer.sequences
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.status = 'paused' OR num_nonnulls(
        OLD.brake_at_most, OLD.apply_brake, NEW.brake_at_most, NEW.apply_brake) > 0)
    EXECUTE FUNCTION sequencer.follow_brake();

-- The caller has locked the row of the brake. If another session, such as apply, has locked the
-- sequence, do not wait for it, as it may wait for the caller's enrollments: nothing more is sent,
-- and the caller tries again.
CREATE FUNCTION sequencer.brake(sequence text, begun integer, is_over boolean, at timestamptz) RETURNS void
LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    rule record;
    cause text;
    revised integer;
BEGIN
    SELECT r.*, q.brake_per INTO rule FROM sequencer.sequences AS q, sequencer.brake_of(
               q.brake_at_most, q.brake_per, q.apply_brake, q.apply_brake_until, brake.at) AS r
     WHERE q.name = brake.sequence;
    IF rule.at_most IS NULL THEN
        RETURN;
    END IF;
    UPDATE sequencer.brakes AS b SET (at, times) = (
        SELECT coalesce(array_agg(s.at ORDER BY s.at), '{}'), coalesce(array_agg(s.times ORDER BY s.at), '{}')
          FROM (SELECT o.at, sum(o.times)::integer AS times
                  FROM (SELECT * FROM unnest(b.at, b.times)
                        UNION ALL SELECT date_bin(rule.per / 60, brake.at, 'epoch') + rule.per / 60,
                                         brake.begun)
                       AS o (at, times)
                 WHERE o.at > brake.at - greatest(rule.per, rule.brake_per) AND o.times > 0 GROUP BY o.at) AS s)
     WHERE b.sequence = brake.sequence;
    IF NOT is_over THEN
        RETURN;
    END IF;
    SELECT format('brake: more than %s in %s %s', rule.at_most, seconds / u.size,
                  CASE WHEN seconds = u.size THEN u.name ELSE u.name || 's' END)
      INTO cause
      FROM CAST(extract(epoch FROM rule.per) AS bigint) AS seconds
      JOIN (VALUES (3600, 'hour'), (60, 'minute'), (1, 'second')) AS u (size, name) ON seconds % u.size = 0
     ORDER BY u.size DESC LIMIT 1;
    UPDATE sequencer.sequences AS q SET status = 'paused'
     WHERE q.name IN (SELECT s.name FROM sequencer.sequences AS s
                       WHERE s.name = brake.sequence AND s.status <> 'paused' FOR UPDATE SKIP LOCKED)
    RETURNING q.revision INTO revised;
    IF FOUND THEN
        PERFORM sequencer.write_revision(brake.sequence, revised, cause);
        UPDATE sequencer.brakes AS b SET paused_at = brake.at, reason = cause WHERE b.sequence = brake.sequence;
    END IF;
END $$;

COMMENT ON FUNCTION sequencer.brake IS 'Count side effects as they begin; if the brake allows no more, pause their sequence.';

CREATE FUNCTION sequencer.brake_of(
    brake_at_most integer, brake_per interval, apply_brake integer, apply_brake_until timestamptz,
    at timestamptz, OUT at_most integer, OUT per interval
) LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN apply_brake_until > at THEN apply_brake ELSE brake_at_most END,
           CASE WHEN apply_brake_until > at THEN interval '1 hour' ELSE brake_per END
$$;

COMMENT ON FUNCTION sequencer.brake_of IS 'Return the brake of a sequence at a time, by its columns.';


-- daemons ---------------------------------------------------------------------------------------

CREATE TABLE sequencer.daemons (
    name        text COLLATE "C" PRIMARY KEY,
    started_at  timestamptz NOT NULL DEFAULT now(),
    alive_until timestamptz NOT NULL,
    types       text[] NOT NULL DEFAULT '{}'
);

COMMENT ON TABLE  sequencer.daemons IS 'The running daemons. A lease is valid for as long as its daemon is alive, whatever happens to the row.';
COMMENT ON COLUMN sequencer.daemons.alive_until IS 'Extended by each heartbeat; a daemon is considered dead after this time.';
COMMENT ON COLUMN sequencer.daemons.types IS 'The step types for which it has a runner. Daemons without one leave such steps to it.';

CREATE TABLE sequencer.problems (
    daemon   text COLLATE "C" NOT NULL REFERENCES sequencer.daemons ON DELETE CASCADE,
    kind     text NOT NULL,
    about    text NOT NULL,
    sequence text,
    step     text,
    since    timestamptz NOT NULL,
    message  text NOT NULL,
    waiting  bigint,
    PRIMARY KEY (daemon, kind, about)
);

COMMENT ON TABLE  sequencer.problems IS 'What daemons report for operators; a row is deleted when the problem is solved or its daemon has ended.';
COMMENT ON COLUMN sequencer.problems.kind IS 'quarantined: the database refuses to read or write an enrollment, which is retried later. runner: a runner is down. enroll: subjects that a query returns could not be enrolled.';
COMMENT ON COLUMN sequencer.problems.about IS 'The enrollment''s id, or the name of the runner or sequence.';
COMMENT ON COLUMN sequencer.problems.waiting IS 'How many enrollments wait because of it, if known.';

CREATE TABLE sequencer.scheduled_runs (
    sequence    text COLLATE "C" PRIMARY KEY
                REFERENCES sequencer.sequences ON UPDATE CASCADE ON DELETE CASCADE,
    definition  jsonb NOT NULL,
    next_run_at timestamptz NOT NULL CHECK (next_run_at BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    last_run_at timestamptz CHECK (last_run_at BETWEEN '1900-01-01Z' AND '9999-01-01Z'),
    duration    interval,
    found       bigint,
    enrolled    bigint,
    failures    integer NOT NULL DEFAULT 0,
    problem     text,
    daemon      text
);

COMMENT ON TABLE  sequencer.scheduled_runs IS 'The last and the next run of sequences with the key enroll, which enroll the subjects that a query returns: see the view schedules.';
COMMENT ON COLUMN sequencer.scheduled_runs.definition IS 'The schedule by which next_run_at was set.';
COMMENT ON COLUMN sequencer.scheduled_runs.next_run_at IS 'When the next run is due; set it to now() for a run within a minute.';
COMMENT ON COLUMN sequencer.scheduled_runs.found IS 'How many subjects could have entered.';
COMMENT ON COLUMN sequencer.scheduled_runs.enrolled IS 'How many of them were enrolled.';
COMMENT ON COLUMN sequencer.scheduled_runs.failures IS 'How many runs in a row have failed; each failure delays the next run more.';
COMMENT ON COLUMN sequencer.scheduled_runs.problem IS 'The problem of the last run; NULL if there was none.';

CREATE TABLE sequencer.console_sessions (
    session    text COLLATE "C" PRIMARY KEY,
    "user"     text NOT NULL,
    groups     text[],
    credential text NOT NULL,
    address    text,
    agent      text,
    begun_at   timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);

COMMENT ON TABLE  sequencer.console_sessions IS 'Sessions of the console''s users, for all daemons. A logout deletes one.';
COMMENT ON COLUMN sequencer.console_sessions.session IS 'The SHA-256 hash of the cookie''s value.';
COMMENT ON COLUMN sequencer.console_sessions.groups IS 'The groups that the OpenID Connect provider named; NULL after a login by password.';
COMMENT ON COLUMN sequencer.console_sessions.credential IS 'A hash of what the login relied on: a session ends when the password or the provider changes.';
COMMENT ON COLUMN sequencer.console_sessions.address IS 'Where the login came from.';
COMMENT ON COLUMN sequencer.console_sessions.agent IS 'The browser, as it called itself.';


-- definitions: triggers -------------------------------------------------------------------------

CREATE FUNCTION sequencer.check_sequence() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- pg_timezone_names reads many files: neither the default nor a zone in use is looked up there
    IF NEW.timezone <> 'UTC'
       AND NOT EXISTS (SELECT FROM sequencer.sequences WHERE timezone = NEW.timezone)
       AND NOT EXISTS (SELECT FROM pg_timezone_names WHERE name = NEW.timezone) THEN
        RAISE check_violation USING
            MESSAGE = format('timezone %L of sequence %L is not known', NEW.timezone, NEW.name),
            SCHEMA = 'sequencer', TABLE = 'sequences', COLUMN = 'timezone',
            HINT = 'Write an IANA name such as Europe/Berlin; SELECT name FROM pg_timezone_names lists them.';
    END IF;
    IF TG_OP = 'INSERT' THEN
        NEW.revision := sequencer.next_revision();
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER check_on_insert BEFORE INSERT ON sequencer.sequences
    FOR EACH ROW EXECUTE FUNCTION sequencer.check_sequence();
CREATE TRIGGER check_on_update BEFORE UPDATE OF timezone ON sequencer.sequences
    FOR EACH ROW EXECUTE FUNCTION sequencer.check_sequence();

-- Daemons identify a definition by its name and revision, and the history of a name is in the order of
-- revisions. So a sequence that is renamed gets a new revision, too.
CREATE FUNCTION sequencer.draw_revision() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- once per transaction: if this transaction has made this version of the row, it has a new one already
    NEW.revision := CASE WHEN OLD.xmin = pg_current_xact_id()::xid AND OLD.name = NEW.name
                         THEN OLD.revision ELSE sequencer.next_revision() END;
    IF OLD.status = 'paused' AND NEW.status <> 'paused' THEN
        NEW.resumed_at := clock_timestamp();
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER draw_revision BEFORE UPDATE ON sequencer.sequences
    FOR EACH ROW EXECUTE FUNCTION sequencer.draw_revision();

-- A change of steps is a change of their sequence: the daemon reads one number to notice it.
CREATE FUNCTION sequencer.touch_sequences() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    changed text[];
    goals text[];
BEGIN
    IF TG_OP = 'INSERT' THEN
        SELECT array_agg(DISTINCT sequence), array_agg(DISTINCT sequence) FILTER (WHERE type = 'Goal')
          INTO changed, goals FROM new_steps;
    ELSIF TG_OP = 'DELETE' THEN
        SELECT array_agg(DISTINCT sequence) INTO changed FROM old_steps;
    ELSE
        -- the columns that the daemon writes do not count
        WITH before AS (
            SELECT sequence, name, position, type, config, next_step, alt_next_step, seed
              FROM old_steps
        ), after AS (
            SELECT sequence, name, position, type, config, next_step, alt_next_step, seed
              FROM new_steps
        ), difference AS (
            (TABLE before EXCEPT TABLE after) UNION ALL (TABLE after EXCEPT TABLE before)
        )
        SELECT array_agg(DISTINCT sequence) INTO changed FROM difference;
        -- a goal that is only renamed, moved or given another next step is met by no other enrollments
        SELECT array_agg(DISTINCT sequence) INTO goals FROM (
            SELECT sequence, config FROM new_steps WHERE type = 'Goal'
            EXCEPT SELECT sequence, config FROM old_steps WHERE type = 'Goal') AS other;
    END IF;
    -- the second update fires this trigger again, which then finds nothing changed
    IF changed IS NOT NULL THEN
        UPDATE sequencer.sequences SET revision = revision WHERE name = ANY (changed);
    END IF;
    IF goals IS NOT NULL THEN
        -- a goal affects all enrollments in the sequence
        UPDATE sequencer.steps SET reschedule_from = 0 WHERE sequence = ANY (goals);
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER touch_on_insert AFTER INSERT ON sequencer.steps
    REFERENCING NEW TABLE AS new_steps
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.touch_sequences();
CREATE TRIGGER touch_on_update AFTER UPDATE ON sequencer.steps
    REFERENCING OLD TABLE AS old_steps NEW TABLE AS new_steps
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.touch_sequences();
CREATE TRIGGER touch_on_delete AFTER DELETE ON sequencer.steps
    REFERENCING OLD TABLE AS old_steps
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.touch_sequences();

CREATE FUNCTION sequencer.seed_split() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.type <> 'Split' THEN
        NEW.seed := NULL;
    ELSIF NEW.seed IS NULL THEN
        NEW.seed := NEW.sequence || '/' || NEW.name;
        WHILE EXISTS (SELECT FROM sequencer.steps WHERE type = 'Split' AND seed = NEW.seed) LOOP
            NEW.seed := NEW.seed || ''''; -- another Split had this name, and uses it as its seed
        END LOOP;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER seed_split BEFORE INSERT OR UPDATE OF type, seed ON sequencer.steps
    FOR EACH ROW EXECUTE FUNCTION sequencer.seed_split();

-- The same as definitions/files.py makes of a duration.
CREATE FUNCTION sequencer.as_duration(span interval) RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE
        WHEN extract(year FROM span) * 12 + extract(month FROM span) > 0 THEN jsonb_build_object(
            'amount', extract(year FROM span) * 12 + extract(month FROM span), 'unit', 'months')
        WHEN extract(day FROM span) > 0
            THEN jsonb_build_object('amount', extract(day FROM span), 'unit', 'days')
        WHEN extract(epoch FROM span) % 3600 = 0
            THEN jsonb_build_object('amount', extract(epoch FROM span)::bigint / 3600, 'unit', 'hours')
        ELSE jsonb_build_object('amount', ceil(extract(epoch FROM span))::bigint, 'unit', 'seconds') END
$$;

COMMENT ON FUNCTION sequencer.as_duration IS 'Return an interval of one unit in the form of a definition file.';

-- The definition as in a file: what revisions store, and what `sequencerd plan` compares with.
CREATE FUNCTION sequencer.document(sequence text) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object(
        'name', q.name, 'description', q.description, 'timezone', q.timezone, 'status', q.status,
        'reentry', CASE
            WHEN q.reentry = 'after' THEN jsonb_build_object('after', sequencer.as_duration(q.reentry_after))
            ELSE to_jsonb(q.reentry) END,
        'lookup', q.lookup, 'recheck', extract(epoch FROM q.recheck),
        'window', q.time_window,
        'topic', q.topic, 'locale', q.locale,
        'partials', coalesce(q.partials, '{}'),
        'enroll', q.enroll,
        'brake', CASE WHEN q.brake_at_most IS NOT NULL THEN jsonb_build_object(
            'at_most', q.brake_at_most, 'per', sequencer.as_duration(q.brake_per)) END,
        'steps', (
            SELECT coalesce(jsonb_agg(jsonb_build_object(
                       'name', s.name, 'type', s.type, 'config', s.config,
                       'next', s.next_step, 'altNext', s.alt_next_step)
                       || CASE WHEN s.seed <> s.sequence || '/' || s.name
                               THEN jsonb_build_object('seed', s.seed) ELSE '{}' END
                       ORDER BY s.name <> q.first_step COLLATE "C", s.position), '[]')
              FROM sequencer.steps AS s WHERE s.sequence = q.name))
      FROM sequencer.sequences AS q WHERE q.name = document.sequence
$$;

COMMENT ON FUNCTION sequencer.document IS 'Return a sequence and its steps, with the keys of a definition file.';

CREATE FUNCTION sequencer.write_revision(sequence text, revision integer, reason text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    last jsonb;
    present CONSTANT jsonb := sequencer.document(write_revision.sequence);
BEGIN
    SELECT r.document INTO last FROM sequencer.revisions AS r
     WHERE r.sequence = write_revision.sequence ORDER BY r.revision DESC LIMIT 1;
    IF jsonb_array_length(present->'steps') > 20000 THEN
        RAISE program_limit_exceeded USING
            MESSAGE = format('sequence %L has %s steps; at most 20000 are possible',
                             write_revision.sequence, jsonb_array_length(present->'steps')),
            SCHEMA = 'sequencer', TABLE = 'steps', COLUMN = 'sequence',
            HINT = 'Split the sequence: a step of type GoTo leads to another sequence.';
    END IF;
    IF present IS DISTINCT FROM last THEN
        -- it exists if an earlier change of this transaction has been written
        INSERT INTO sequencer.revisions (sequence, revision, at, by, reason, document)
        VALUES (write_revision.sequence, write_revision.revision, clock_timestamp(), session_user,
                write_revision.reason, present)
        ON CONFLICT ON CONSTRAINT revisions_pkey DO UPDATE SET document = excluded.document;
    END IF;
END $$;

-- Runs at the end of the transaction, once for each change; only the call for the last row version records.
CREATE FUNCTION sequencer.record_revision() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM sequencer.sequences WHERE name = NEW.name AND ctid = NEW.ctid) THEN
        PERFORM sequencer.write_revision(NEW.name, NEW.revision, sequencer.reason());
    END IF;
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER record_revision AFTER INSERT OR UPDATE ON sequencer.sequences
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION sequencer.record_revision();

CREATE FUNCTION sequencer.mark_reschedule() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_ARGV[0] = 'steps' THEN
        NEW.reschedule_from := 0;
        RETURN NEW;
    END IF;
    -- nothing of a topic waits at steps without a side effect
    UPDATE sequencer.steps SET reschedule_from = 0
     WHERE sequence = NEW.name
       AND ((OLD.timezone, OLD.lookup, OLD.recheck, OLD.time_window)
                IS DISTINCT FROM (NEW.timezone, NEW.lookup, NEW.recheck, NEW.time_window)
            OR type <> ALL (sequencer.instant_types()));
    RETURN NULL;
END $$;

CREATE TRIGGER mark_reschedule BEFORE UPDATE OF type, config ON sequencer.steps
    FOR EACH ROW WHEN ((OLD.type, OLD.config) IS DISTINCT FROM (NEW.type, NEW.config))
    EXECUTE FUNCTION sequencer.mark_reschedule('steps');
CREATE TRIGGER mark_reschedule AFTER UPDATE OF timezone, lookup, recheck, time_window, topic
    ON sequencer.sequences
    FOR EACH ROW WHEN ((OLD.timezone, OLD.lookup, OLD.recheck, OLD.time_window, OLD.topic)
        IS DISTINCT FROM (NEW.timezone, NEW.lookup, NEW.recheck, NEW.time_window, NEW.topic))
    EXECUTE FUNCTION sequencer.mark_reschedule('sequences');

-- Holidays are part of the definitions that use their calendar: a change is a new revision of those, and
-- the enrollments that wait there are rescheduled.
CREATE FUNCTION sequencer.follow_holidays() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    changed jsonb;
BEGIN
    IF TG_OP = 'INSERT' THEN
        SELECT jsonb_build_object('calendars', jsonb_agg(DISTINCT calendar)) INTO changed FROM new_days;
    ELSIF TG_OP = 'DELETE' THEN
        SELECT jsonb_build_object('calendars', jsonb_agg(DISTINCT calendar)) INTO changed FROM old_days;
    ELSE
        WITH before AS (SELECT calendar, day FROM old_days),
             after AS (SELECT calendar, day FROM new_days),
             difference AS ((TABLE before EXCEPT TABLE after) UNION ALL (TABLE after EXCEPT TABLE before))
        SELECT jsonb_build_object('calendars', jsonb_agg(DISTINCT calendar)) INTO changed FROM difference;
    END IF;
    WITH concerned AS (
        UPDATE sequencer.steps AS s SET reschedule_from = 0 FROM sequencer.sequences AS q
         WHERE q.name = s.sequence
           AND (changed->'calendars' ? (q.time_window->>'holidays')
                OR jsonb_path_exists(s.config, '$.**.holidays ? (@ == $calendars[*])', changed))
        RETURNING s.sequence
    )
    UPDATE sequencer.sequences SET revision = revision
     WHERE name IN (SELECT sequence FROM concerned);
    RETURN NULL;
END $$;

CREATE TRIGGER follow_insert AFTER INSERT ON sequencer.holidays
    REFERENCING NEW TABLE AS new_days
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.follow_holidays();
CREATE TRIGGER follow_update AFTER UPDATE ON sequencer.holidays
    REFERENCING OLD TABLE AS old_days NEW TABLE AS new_days
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.follow_holidays();
CREATE TRIGGER follow_delete AFTER DELETE ON sequencer.holidays
    REFERENCING OLD TABLE AS old_days
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.follow_holidays();

-- Replaces a foreign key on enrollments, whose check would lock the step's row on every move.
CREATE FUNCTION sequencer.guard_step() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    present bigint;
BEGIN
    SELECT count(*) INTO present FROM (
        SELECT FROM sequencer.enrollments
         WHERE sequence = OLD.sequence AND step = OLD.name AND status = 'active' LIMIT 1000) AS e;
    IF present > 0 THEN
        RAISE foreign_key_violation USING
            MESSAGE = format('step %L of sequence %L cannot be deleted: %s active enrollments are there',
                             OLD.name, OLD.sequence,
                             CASE WHEN present < 1000 THEN present::text ELSE '1000 or more' END),
            SCHEMA = 'sequencer', TABLE = 'steps', COLUMN = 'name',
            HINT = 'Move or cancel them first: UPDATE sequencer.enrollments SET step = ... WHERE ...';
    END IF;
    RETURN OLD;
END $$;

CREATE TRIGGER guard_delete BEFORE DELETE ON sequencer.steps
    FOR EACH ROW EXECUTE FUNCTION sequencer.guard_step();

-- The same as `steps` in the records of sequencerd/core/step_types.
CREATE FUNCTION sequencer.named_steps(type text, sequence text, config jsonb)
RETURNS TABLE (path text[], of_sequence text, step text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT '{step}'::text[],
           CASE WHEN jsonb_typeof(config->'sequence') = 'string' THEN config->>'sequence'
                ELSE named_steps.sequence END,
           config->>'step'
     WHERE named_steps.type = 'GoTo' AND jsonb_typeof(config->'step') = 'string'
    UNION ALL
    SELECT ARRAY[l.key, (i.number - 1)::text, 'step'], named_steps.sequence, i.item->>'step'
      FROM (VALUES ('Switch', 'cases'), ('Split', 'ways')) AS l (type, key),
           jsonb_array_elements(CASE WHEN jsonb_typeof(config->l.key) = 'array'
                                     THEN config->l.key ELSE '[]' END)
               WITH ORDINALITY AS i (item, number)
     WHERE l.type = named_steps.type AND jsonb_typeof(i.item->'step') = 'string'
$$;

COMMENT ON FUNCTION sequencer.named_steps IS 'Return the steps that a config names, each with its path in the config.';

-- As the foreign keys of next_step and alt_next_step, at the end of the transaction.
CREATE FUNCTION sequencer.guard_named_step() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    naming record;
BEGIN
    SELECT s.sequence, s.name INTO naming
      FROM sequencer.steps AS s, sequencer.named_steps(s.type, s.sequence, s.config) AS n
     WHERE s.type IN ('GoTo', 'Switch', 'Split')
       AND n.of_sequence = OLD.sequence AND n.step = OLD.name LIMIT 1;
    IF FOUND AND NOT EXISTS (SELECT FROM sequencer.steps
                              WHERE sequence = OLD.sequence AND name = OLD.name) THEN
        RAISE foreign_key_violation USING
            MESSAGE = format('step %L of sequence %L cannot be deleted: step %L of sequence %L leads to it',
                             OLD.name, OLD.sequence, naming.name, naming.sequence),
            SCHEMA = 'sequencer', TABLE = 'steps', COLUMN = 'config',
            HINT = 'Change the config of that step in the same transaction, or before.';
    END IF;
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER guard_named AFTER DELETE ON sequencer.steps
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION sequencer.guard_named_step();

-- The name of a step with a side effect in `executed`; the same as model.effect_key in Python.
CREATE FUNCTION sequencer.effect_key(sequence text, step text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT replace(replace(effect_key.sequence, '%', '%25'), '/', '%2F') || '/' || effect_key.step
$$;

COMMENT ON FUNCTION sequencer.effect_key IS 'Return the unique name of a step across sequences, as in enrollments.executed.';

-- Called by follow_rename, for steps that name a renamed step or sequence in their configs.
CREATE FUNCTION sequencer.rename_in_configs(sequence text, step text, new_sequence text, new_step text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    new_name CONSTANT jsonb := to_jsonb(CASE WHEN rename_in_configs.step IS NULL THEN new_sequence
                                             ELSE new_step END);
    naming record;
BEGIN
    FOR naming IN
        SELECT s.sequence, s.name, n.path
          FROM sequencer.steps AS s, sequencer.named_steps(s.type, s.sequence, s.config) AS n
         WHERE s.type IN ('GoTo', 'Switch', 'Split')
           AND CASE WHEN rename_in_configs.step IS NULL
                    THEN s.config->>'sequence' = rename_in_configs.sequence
                    ELSE n.of_sequence = rename_in_configs.sequence AND n.step = rename_in_configs.step END
    LOOP
        UPDATE sequencer.steps AS s
           SET config = jsonb_set(s.config, CASE WHEN rename_in_configs.step IS NULL THEN '{sequence}'
                                                 ELSE naming.path END, new_name)
         WHERE s.sequence = naming.sequence AND s.name = naming.name;
    END LOOP;
    IF rename_in_configs.step IS NULL THEN
        UPDATE sequencer.steps AS s
           SET config = jsonb_set(s.config, '{sequence}', new_name)
         WHERE s.type IN ('Enroll', 'Cancel') AND s.config->>'sequence' = rename_in_configs.sequence;
    END IF;
END $$;

-- A rename updates the enrollments at the step, the goals and side effects recorded by name, and the
-- configs that name the step.
CREATE FUNCTION sequencer.follow_rename() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM set_config('sequencer.renaming', 'on', true);
    IF TG_ARGV[0] = 'sequences' THEN
        UPDATE sequencer.enrollments SET sequence = NEW.name WHERE sequence = OLD.name;
        UPDATE sequencer.enrollments
           SET goals_elsewhere = jsonb_set(goals_elsewhere - OLD.name, ARRAY[NEW.name],
                                           goals_elsewhere->OLD.name)
         WHERE goals_elsewhere ? OLD.name;
        UPDATE sequencer.enrollments AS e
           SET executed = ARRAY(
               SELECT CASE WHEN starts_with(key, sequencer.effect_key(OLD.name, ''))
                           THEN sequencer.effect_key(NEW.name, substr(key,
                                length(sequencer.effect_key(OLD.name, '')) + 1))
                           ELSE key END
                 FROM unnest(e.executed) WITH ORDINALITY AS known (key, number) ORDER BY number)
         WHERE status = 'active' AND executed <> '{}';
        PERFORM sequencer.rename_in_configs(OLD.name, NULL, NEW.name, NULL);
        -- joins those of a deleted sequence that had the new name
        UPDATE sequencer.revisions SET sequence = NEW.name WHERE sequence = OLD.name;
    ELSIF NEW.name <> OLD.name THEN
        UPDATE sequencer.enrollments SET step = NEW.name
         WHERE sequence = NEW.sequence AND step = OLD.name;
        IF NEW.type = 'Goal' THEN
            -- otherwise it would move enrollments a second time
            UPDATE sequencer.enrollments
               SET goals_met = array_replace(goals_met, OLD.name, NEW.name)
             WHERE sequence = NEW.sequence AND OLD.name = ANY (goals_met);
            UPDATE sequencer.enrollments
               SET goals_elsewhere = jsonb_set(goals_elsewhere, ARRAY[NEW.sequence],
                       (goals_elsewhere->NEW.sequence) - OLD.name || to_jsonb(NEW.name))
             WHERE goals_elsewhere->NEW.sequence ? OLD.name;
        END IF;
        UPDATE sequencer.enrollments
           SET executed = array_replace(executed, sequencer.effect_key(NEW.sequence, OLD.name),
                                        sequencer.effect_key(NEW.sequence, NEW.name))
         WHERE status = 'active' AND executed <> '{}';
        PERFORM sequencer.rename_in_configs(NEW.sequence, OLD.name, NEW.sequence, NEW.name);
        UPDATE sequencer.sequences SET first_step = NEW.name
         WHERE name = NEW.sequence AND first_step = OLD.name;
    END IF;
    PERFORM set_config('sequencer.renaming', '', true);
    RETURN NULL;
END $$;

CREATE TRIGGER follow_rename AFTER UPDATE OF name ON sequencer.sequences
    FOR EACH ROW WHEN (OLD.name <> NEW.name) EXECUTE FUNCTION sequencer.follow_rename('sequences');
CREATE TRIGGER follow_rename AFTER UPDATE OF name ON sequencer.steps
    FOR EACH ROW WHEN (OLD.name <> NEW.name) EXECUTE FUNCTION sequencer.follow_rename('steps');

CREATE FUNCTION sequencer.follow_reentry() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.reentry <> 'after' THEN
        UPDATE sequencer.enrollments SET reentry = NEW.reentry WHERE sequence = NEW.name;
    ELSE -- of each subject, the last enrollment alone prevents another
        UPDATE sequencer.enrollments AS e
           SET reentry = CASE WHEN e.id = last.id OR e.status = 'active' THEN 'after' ELSE 'after_end' END
          FROM (SELECT DISTINCT ON (subject) subject, id
                  FROM sequencer.enrollments WHERE sequence = NEW.name
                 ORDER BY subject, status <> 'active', ended_at DESC, id DESC) AS last
         WHERE e.sequence = NEW.name AND e.subject = last.subject;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER follow_reentry AFTER UPDATE OF reentry ON sequencer.sequences
    FOR EACH ROW WHEN (OLD.reentry <> NEW.reentry) EXECUTE FUNCTION sequencer.follow_reentry();


-- enrollments: triggers -------------------------------------------------------------------------

-- ORMs send NULL for columns that the application left out, and JSON null for data.
CREATE FUNCTION sequencer.apply_defaults() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.id := coalesce(NEW.id, nextval('sequencer.enrollments_id_seq'));
    NEW.data := coalesce(nullif(NEW.data, 'null'), '{}');
    NEW.status := coalesce(NEW.status, 'active');
    NEW.visit := coalesce(NEW.visit, 1);
    NEW.attempt := coalesce(NEW.attempt, 0);
    NEW.leases := coalesce(NEW.leases, 0);
    NEW.goals_met := coalesce(NEW.goals_met, '{}');
    NEW.goals_elsewhere := nullif(NEW.goals_elsewhere, 'null');
    NEW.executed := coalesce(NEW.executed, '{}');
    NEW.created_at := coalesce(NEW.created_at, now());
    NEW.tag := coalesce(NEW.tag, gen_random_uuid());
    IF NEW.status = 'active' THEN
        NEW.wake_at := coalesce(NEW.wake_at, now());
    END IF;
    RETURN NEW;
END $$;

-- Row triggers fire in the order of their names. Each statement parses their conditions again: the fewer
-- expressions these have, the less a single insert costs.
CREATE TRIGGER apply_defaults BEFORE INSERT ON sequencer.enrollments
    FOR EACH ROW WHEN (num_nulls(NEW.wake_at, NEW.id, NEW.data, NEW.status, NEW.visit, NEW.attempt, NEW.leases,
                                 NEW.goals_met, NEW.executed, NEW.created_at, NEW.tag) > 0
        OR NEW.goals_elsewhere IS NOT NULL OR jsonb_typeof(NEW.data) = 'null')
    EXECUTE FUNCTION sequencer.apply_defaults();

-- Some ORMs name every column and write DEFAULT, for which a role needs the INSERT privilege on each.
-- So sequencer_enroller has it, and this trigger rejects values that it may not choose.
CREATE FUNCTION sequencer.check_columns() RETURNS trigger
LANGUAGE plpgsql AS $$ -- no SET search_path, which would slow down each row: all names are qualified
BEGIN
    IF NOT pg_catalog.has_any_column_privilege(TG_RELID, 'INSERT') THEN
        RETURN NEW; -- through a view, whose owner is responsible
    END IF;
    IF NEW.status OPERATOR(pg_catalog.<>) 'active' OR NEW.entered_at IS NOT NULL
       OR NEW.visit OPERATOR(pg_catalog.<>) 1 OR NEW.attempt OPERATOR(pg_catalog.<>) 0
       OR NEW.leases OPERATOR(pg_catalog.<>) 0 OR NEW.goals_met OPERATOR(pg_catalog.<>) '{}' OR NEW.goals_elsewhere IS NOT NULL
       OR NEW.executed OPERATOR(pg_catalog.<>) '{}' OR NEW.leased_by IS NOT NULL
       OR NEW.retry_at IS NOT NULL OR NEW.expires_at IS NOT NULL OR NEW.waits_until IS NOT NULL OR NEW.failure IS NOT NULL
       OR NEW.last_error IS NOT NULL OR NEW.ended_at IS NOT NULL THEN
        RAISE insufficient_privilege USING
            MESSAGE = pg_catalog.concat('permission denied: an enrollment begins as active, in its ',
                'first visit; how far it has come is for the daemon to write'),
            SCHEMA = 'sequencer', TABLE = 'enrollments',
            HINT = 'Leave out status, entered_at, visit, attempt, leases, goals_met, executed, leased_by, retry_at, expires_at, waits_until, failure, last_error and ended_at, or write DEFAULT or NULL.';
    -- an id that the sequence has not reached would collide with a later enrollment; on a shard of Citus,
    -- ids come from the sequences of several nodes
    ELSIF TG_TABLE_NAME OPERATOR(pg_catalog.=) 'enrollments' AND (
          NEW.id OPERATOR(pg_catalog.<=) 0 OR NEW.id OPERATOR(pg_catalog.>) coalesce(
              pg_catalog.pg_sequence_last_value('sequencer.enrollments_id_seq'), 0)) THEN
        RAISE insufficient_privilege USING
            MESSAGE = pg_catalog.format('permission denied: id %s has not been generated yet', NEW.id),
            SCHEMA = 'sequencer', TABLE = 'enrollments', COLUMN = 'id',
            HINT = 'Leave out id, or write DEFAULT or NULL; RETURNING id returns the one assigned.';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER as_granted BEFORE INSERT ON sequencer.enrollments
    FOR EACH ROW WHEN (NOT has_table_privilege('sequencer.enrollments'::regclass, 'INSERT'))
    EXECUTE FUNCTION sequencer.check_columns();

CREATE FUNCTION sequencer.reentry_time(ended_at timestamptz, after interval, timezone text)
RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT (reentry_time.ended_at AT TIME ZONE reentry_time.timezone + reentry_time.after)
           AT TIME ZONE reentry_time.timezone
$$;

COMMENT ON FUNCTION sequencer.reentry_time IS 'Return when a subject may be enrolled again by the reentry policy after.';

-- An ended enrollment with the reentry policy after prevents another (entry is 0) until its subject is
-- enrolled again: only then is the time compared, so that nothing has to be written when it is over.
CREATE FUNCTION sequencer.allow_reentry(sequence text, subject text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    over CONSTANT bigint[] := ARRAY(
        SELECT e.id FROM sequencer.enrollments AS e JOIN sequencer.sequences AS s ON s.name = e.sequence
         WHERE s.name = allow_reentry.sequence AND s.reentry = 'after'
           AND e.subject = allow_reentry.subject AND e.entry = 0 AND e.status <> 'active'
           AND sequencer.reentry_time(e.ended_at, s.reentry_after, s.timezone) <= now() FOR UPDATE OF e);
BEGIN
    IF over <> '{}' THEN
        UPDATE sequencer.enrollments AS e SET reentry = 'after_end' WHERE e.id = ANY (over);
    END IF;
END $$;

-- A row trigger, as a default cannot read another table and a rejection must precede the insert. Reading
-- the definitions takes longer than the rest of an insert, so the entry policy (first step and reentry)
-- is cached for the rest of the statement, in settings of the transaction.
CREATE FUNCTION sequencer.reuse_entry_policy() RETURNS trigger
LANGUAGE plpgsql AS $$ -- no SET search_path, which would slow down each row: all names are qualified
BEGIN
    IF NEW.sequence OPERATOR(pg_catalog.=) pg_catalog.current_setting('sequencer.entry_sequence', true)
       AND NEW.sequence OPERATOR(pg_catalog.<>) '' -- the value of a setting that was reset
       AND NEW.step IS NULL AND NEW.status OPERATOR(pg_catalog.=) 'active' THEN
        NEW.step := pg_catalog.current_setting('sequencer.entry_step');
        NEW.reentry := pg_catalog.current_setting('sequencer.entry_reentry');
    ELSE
        NEW.reentry := NULL; -- the trigger set_entry_policy sets it
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION sequencer.set_entry_policy() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    policy record;
    kept text; -- an assignment is faster than PERFORM
BEGIN
    SELECT s.first_step, s.status, s.reentry,
           EXISTS (SELECT FROM sequencer.steps AS p
                    WHERE p.sequence = s.name AND p.name = coalesce(NEW.step, s.first_step)) AS known
      INTO policy FROM sequencer.sequences AS s WHERE s.name = NEW.sequence;
    IF NOT FOUND THEN
        RAISE foreign_key_violation USING
            MESSAGE = format('sequence %L does not exist', NEW.sequence),
            SCHEMA = 'sequencer', TABLE = 'enrollments', COLUMN = 'sequence',
            HINT = 'SELECT name FROM sequencer.sequences lists all sequences.';
    ELSIF NOT policy.known THEN
        RAISE foreign_key_violation USING
            MESSAGE = format('step %L does not exist in sequence %L',
                             coalesce(NEW.step, policy.first_step), NEW.sequence),
            SCHEMA = 'sequencer', TABLE = 'enrollments', COLUMN = 'step',
            HINT = 'SELECT name FROM sequencer.steps WHERE sequence = ... lists its steps.';
    ELSIF policy.status = 'archived' AND NEW.status = 'active' THEN
        RAISE check_violation USING
            MESSAGE = format('sequence %L is archived: it accepts no new enrollments', NEW.sequence),
            SCHEMA = 'sequencer', TABLE = 'enrollments', COLUMN = 'sequence',
            HINT = 'To open it again: UPDATE sequencer.sequences SET status = ''active'' WHERE name = ...';
    END IF;
    IF policy.reentry = 'after' THEN
        PERFORM sequencer.allow_reentry(NEW.sequence, NEW.subject);
    ELSIF NEW.step IS NULL AND NEW.status = 'active' THEN
        kept := set_config('sequencer.entry_sequence', NEW.sequence, true);
        kept := set_config('sequencer.entry_step', policy.first_step, true);
        kept := set_config('sequencer.entry_reentry', policy.reentry, true);
    END IF;
    NEW.step := coalesce(NEW.step, policy.first_step);
    NEW.reentry := policy.reentry;
    IF NEW.status <> 'active' THEN
        NEW.wake_at := NULL;
        NEW.ended_at := coalesce(NEW.ended_at, now());
    END IF;
    RETURN NEW;
END $$;

-- A user can set those settings by hand and so bypass the row trigger; this checks the result once per
-- statement. SECURITY DEFINER, as a user who enrolls through a view may not read the definitions.
CREATE FUNCTION sequencer.check_entries() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    e record;
BEGIN
    -- Citus joins no transition table with a table
    FOR e IN SELECT DISTINCT sequence, step, reentry, status FROM entered LOOP
        PERFORM FROM sequencer.sequences AS s JOIN sequencer.steps AS p ON p.sequence = s.name
          WHERE s.name = e.sequence AND p.name = e.step AND s.reentry = e.reentry
            AND (s.status <> 'archived' OR e.status <> 'active');
        CONTINUE WHEN FOUND;
        RAISE foreign_key_violation USING
            MESSAGE = format(
                'no enrollment can enter sequence %L at step %L with reentry %L: there is no such '
                'step, the sequence is archived, or its reentry policy is another',
                e.sequence, e.step, e.reentry),
            SCHEMA = 'sequencer', TABLE = 'enrollments', COLUMN = 'sequence',
            HINT = 'Leave the settings sequencer.entry_... alone; if the definition was changed meanwhile, insert again.';
    END LOOP;
    RETURN NULL;
END $$;

CREATE TRIGGER check_entries AFTER INSERT ON sequencer.enrollments
    REFERENCING NEW TABLE AS entered
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.check_entries();

CREATE TRIGGER reuse_entry_policy BEFORE INSERT ON sequencer.enrollments
    FOR EACH ROW EXECUTE FUNCTION sequencer.reuse_entry_policy();
CREATE TRIGGER set_entry_policy BEFORE INSERT ON sequencer.enrollments
    FOR EACH ROW WHEN (NEW.reentry IS NULL) EXECUTE FUNCTION sequencer.set_entry_policy();

-- Data are read and written with every move of a batch, so their size is limited. To change the limit:
-- ALTER DATABASE ... SET sequencer.max_data = '5MB'. The trigger's condition exempts small data.
CREATE FUNCTION sequencer.limit_data() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    size bigint := pg_column_size(NEW.data);
    most bigint;
BEGIN
    BEGIN
        most := pg_size_bytes(nullif(current_setting('sequencer.max_data', true), ''));
    EXCEPTION WHEN data_exception THEN -- an invalid size counts as not set
        most := NULL;
    END;
    IF most IS NULL OR most <= 0 THEN
        most := 1024 * 1024;
    END IF;
    IF size > most THEN
        RAISE program_limit_exceeded USING
            MESSAGE = format('the data of subject %L in sequence %L has %s, more than the limit of %s',
                             NEW.subject, NEW.sequence, pg_size_pretty(size),
                             pg_size_pretty(most)),
            SCHEMA = 'sequencer', TABLE = 'enrollments', COLUMN = 'data',
            HINT = 'Keep large data in your own table; ALTER DATABASE ... SET sequencer.max_data raises the limit.';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER limit_data BEFORE INSERT OR UPDATE OF data ON sequencer.enrollments
    FOR EACH ROW WHEN (pg_column_size(NEW.data) > 2000)
    EXECUTE FUNCTION sequencer.limit_data();

-- Changed data wake an enrollment immediately, unless it has yet to start, or is executing a side effect,
-- after which it is evaluated anyway. By its name it fires after normalise_status, which takes a wake_at
-- that is set for a complete change of status.
CREATE FUNCTION sequencer.wake_on_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.wake_at := least(NEW.wake_at, now());
    IF NEW.expires_at IS NOT NULL THEN
        NEW.expires_at := '-infinity';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER wake_on_change BEFORE UPDATE OF data, timezone, subject ON sequencer.enrollments
    FOR EACH ROW WHEN (NEW.status = 'active' AND NEW.leased_by IS NULL
        AND NEW.entered_at IS NOT NULL
        AND (OLD.data, OLD.timezone, OLD.subject)
            IS DISTINCT FROM (NEW.data, NEW.timezone, NEW.subject))
    EXECUTE FUNCTION sequencer.wake_on_change();

-- This and the next are called for each row of a manual change: SET search_path would keep the planner from
-- inlining them. It has no effect on a body that is parsed here.
CREATE FUNCTION sequencer.reason() RETURNS text
LANGUAGE sql STABLE
RETURN nullif(regexp_replace(
    left(current_setting('sequencer.reason', true), 500), '[[:cntrl:]]', ' ', 'g'), '');

COMMENT ON FUNCTION sequencer.reason() IS 'Return the reason that the user set for this transaction; NULL without one.';

CREATE FUNCTION sequencer.changed_by() RETURNS text
LANGUAGE sql STABLE
RETURN 'by ' || session_user || coalesce(': ' || sequencer.reason(), '');

COMMENT ON FUNCTION sequencer.changed_by IS 'Return the user and the reason that they set: the message of events for manual changes.';

-- Complete a manual change of status, and record it. The daemon's own writes are complete already.
CREATE FUNCTION sequencer.normalise_status() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.leased_by := NULL;
    NEW.waits_until := NULL;
    IF NEW.status = 'active' THEN
        NEW.wake_at := now();
        NEW.ended_at := NULL;
        NEW.attempt := 0;
        NEW.retry_at := NULL;
        NEW.expires_at := NULL;
        NEW.executed := '{}';
        NEW.failure := NULL;
        NEW.last_error := NULL;
        NEW.reentry := coalesce(
            (SELECT s.reentry FROM sequencer.sequences AS s WHERE s.name = NEW.sequence), NEW.reentry);
    ELSE
        NEW.wake_at := NULL;
        NEW.ended_at := now();
        IF NEW.status <> 'failed' THEN
            NEW.failure := NULL;
        END IF;
    END IF;
    INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message, seconds_at_step)
    VALUES (NEW.id, clock_timestamp(), NEW.sequence, NEW.step, NEW.visit,
            CASE WHEN NEW.status = 'active' THEN 'resumed' ELSE NEW.status END, sequencer.changed_by(),
            extract(epoch FROM clock_timestamp() - NEW.entered_at));
    RETURN NEW;
END $$;

CREATE TRIGGER normalise_status BEFORE UPDATE OF status ON sequencer.enrollments
    FOR EACH ROW WHEN (OLD.status <> NEW.status
        AND ((NEW.status = 'active') <> (NEW.wake_at IS NOT NULL)
             OR (OLD.status <> 'active' AND NEW.status <> 'active')))
    EXECUTE FUNCTION sequencer.normalise_status();

CREATE FUNCTION sequencer.normalise_move() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('sequencer.renaming', true) = 'on' THEN
        RETURN NEW;
    ELSIF OLD.step = NEW.step AND OLD.sequence = NEW.sequence
          AND current_setting('sequencer.sets_visit', true) = OLD.ctid::text THEN
        RETURN NEW; -- the statement sets other columns of the daemon as well
    END IF;
    IF NOT EXISTS (SELECT FROM sequencer.steps
                    WHERE sequence = NEW.sequence AND name = NEW.step) THEN
        RAISE foreign_key_violation USING
            MESSAGE = format('step %L does not exist in sequence %L', NEW.step, NEW.sequence),
            SCHEMA = 'sequencer', TABLE = 'enrollments', COLUMN = 'step',
            HINT = 'SELECT name FROM sequencer.steps WHERE sequence = ... lists its steps.';
    END IF;
    NEW.visit := OLD.visit + 1;
    NEW.attempt := 0;
    NEW.leases := 0;
    NEW.retry_at := NULL;
    NEW.expires_at := NULL;
    NEW.waits_until := NULL;
    NEW.leased_by := NULL;
    NEW.executed := '{}';
    IF OLD.sequence <> NEW.sequence AND OLD.goals_met = NEW.goals_met THEN -- as in core/advance.py
        NEW.goals_met := ARRAY(SELECT jsonb_array_elements_text(
            coalesce(OLD.goals_elsewhere->NEW.sequence, '[]')));
        NEW.goals_elsewhere := nullif(coalesce(OLD.goals_elsewhere, '{}') - NEW.sequence
            || CASE WHEN OLD.goals_met = '{}' THEN '{}'
                    ELSE jsonb_build_object(OLD.sequence, OLD.goals_met) END, '{}');
    END IF;
    IF OLD.entered_at IS NOT NULL THEN -- one that has yet to start keeps its time
        NEW.entered_at := now();
        IF OLD.status = 'active' AND NEW.status = 'active' THEN -- otherwise normalise_status sets it
            NEW.wake_at := now();
        END IF;
    END IF;
    INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message, seconds_at_step)
    VALUES (NEW.id, clock_timestamp(), OLD.sequence, OLD.step, OLD.visit, 'moved',
            format('%s %s %s', CASE WHEN (OLD.sequence, OLD.step) = (NEW.sequence, NEW.step)
                                    THEN 'restarted' ELSE 'to' END, NEW.step, sequencer.changed_by()),
            extract(epoch FROM clock_timestamp() - OLD.entered_at));
    RETURN NEW;
END $$;

CREATE TRIGGER normalise_move BEFORE UPDATE OF sequence, step ON sequencer.enrollments
    FOR EACH ROW WHEN ((OLD.sequence, OLD.step) IS DISTINCT FROM (NEW.sequence, NEW.step)
        AND OLD.visit = NEW.visit)
    EXECUTE FUNCTION sequencer.normalise_move();

-- Setting the step to its present value restarts the step. The daemon, and ORMs that write the
-- whole row, do so without that intention, but they set `visit` in the same statement, which is noted first.
-- The conditions compare what the daemon changes, so that its writes call neither function.
CREATE FUNCTION sequencer.mark_visit() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM set_config('sequencer.sets_visit', OLD.ctid::text, true);
    RETURN NEW;
END $$;

CREATE TRIGGER mark_visit BEFORE UPDATE OF visit ON sequencer.enrollments
    FOR EACH ROW WHEN (NEW.status = 'active' AND OLD.step = NEW.step AND OLD.sequence = NEW.sequence
        AND OLD.visit = NEW.visit AND OLD.leases = NEW.leases
        AND (OLD.wake_at IS NOT DISTINCT FROM NEW.wake_at OR OLD.status <> 'active'))
    EXECUTE FUNCTION sequencer.mark_visit();
CREATE TRIGGER normalise_restart BEFORE UPDATE OF step ON sequencer.enrollments
    FOR EACH ROW WHEN (NEW.status = 'active' AND OLD.step = NEW.step AND OLD.sequence = NEW.sequence
        AND OLD.visit = NEW.visit AND OLD.leases = NEW.leases
        AND (OLD.wake_at IS NOT DISTINCT FROM NEW.wake_at OR OLD.status <> 'active'))
    EXECUTE FUNCTION sequencer.normalise_move();

CREATE FUNCTION sequencer.record_subject() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)
    VALUES (NEW.id, clock_timestamp(), NEW.sequence, NEW.step, NEW.visit, 'retargeted',
            format('from %s to %s %s', regexp_replace(OLD.subject, '[[:cntrl:]]', ' ', 'g'),
                   regexp_replace(NEW.subject, '[[:cntrl:]]', ' ', 'g'), sequencer.changed_by()));
    RETURN NULL;
END $$;

CREATE TRIGGER record_subject AFTER UPDATE OF subject ON sequencer.enrollments
    FOR EACH ROW WHEN (OLD.subject <> NEW.subject) EXECUTE FUNCTION sequencer.record_subject();

CREATE FUNCTION sequencer.set_reentry() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    SELECT s.reentry INTO NEW.reentry FROM sequencer.sequences AS s WHERE s.name = NEW.sequence;
    NEW.reentry := coalesce(NEW.reentry, OLD.reentry);
    IF NEW.reentry = 'after' THEN
        PERFORM sequencer.allow_reentry(NEW.sequence, NEW.subject);
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER set_reentry BEFORE UPDATE OF sequence ON sequencer.enrollments
    FOR EACH ROW WHEN (OLD.sequence <> NEW.sequence) EXECUTE FUNCTION sequencer.set_reentry();


-- notifications ---------------------------------------------------------------------------------

CREATE FUNCTION sequencer.notify_due() RETURNS trigger
LANGUAGE plpgsql AS $$ -- no SET search_path, as above
DECLARE
    due record;
    nothing pg_catalog.text;
BEGIN
    IF TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN -- the next statement reads the definitions again
        nothing := pg_catalog.set_config('sequencer.entry_sequence', NULL, true);
    END IF;
    -- The notify lock. Commits that notify wait for each other, so NOTIFY is skipped while daemons poll;
    -- a daemon that wants to be notified holds the lock. A transaction that gets a share of it skips
    -- NOTIFY and keeps its share until it ends, so that the daemon that acquires the lock afterwards
    -- sees what was written.
    IF pg_catalog.current_setting('sequencer.notify', true) OPERATOR(pg_catalog.=) 'off'
       OR pg_catalog.pg_try_advisory_xact_lock_shared(7364528, 4) THEN
        RETURN NULL;
    END IF;
    FOR due IN SELECT sequence, step, pg_catalog.min(wake_at) AS since,
                      pg_catalog.max(wake_at) AS until FROM changed
        WHERE status OPERATOR(pg_catalog.=) 'active' AND leased_by IS NULL
          AND wake_at OPERATOR(pg_catalog.<)
              (pg_catalog.now() OPERATOR(pg_catalog.+) interval '1 minute')
        GROUP BY sequence, step
    LOOP
        -- now() is the same in the whole transaction, whose equal notifications are sent once
        PERFORM pg_catalog.pg_notify('sequencer', pg_catalog.json_strip_nulls(
            pg_catalog.json_build_object(
                'due', pg_catalog.json_build_array(due.sequence, due.step),
                'since', CASE WHEN due.since OPERATOR(pg_catalog.>=) pg_catalog.now()
                              THEN pg_catalog.now() END,
                'later', CASE WHEN due.until OPERATOR(pg_catalog.>) pg_catalog.now()
                              THEN true END))::pg_catalog.text);
    END LOOP;
    RETURN NULL;
END $$;

CREATE TRIGGER notify_on_insert AFTER INSERT ON sequencer.enrollments
    REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.notify_due();
CREATE TRIGGER notify_on_update AFTER UPDATE ON sequencer.enrollments
    REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.notify_due();

CREATE FUNCTION sequencer.notify_definitions() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- on a node of Citus no daemon listens, and a transaction over several nodes that notifies fails
    IF TG_TABLE_NAME <> 'sequences' OR current_setting('sequencer.notify', true) = 'off' THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify('sequencer', '{"definitions": true}');
    END IF;
    -- the daemon reads only what is named; a rename concerns both names
    PERFORM pg_notify('sequencer', json_build_object('definitions', name)::text)
       FROM unnest(ARRAY[OLD.name, NEW.name]) AS name WHERE name IS NOT NULL;
    RETURN NULL;
END $$;

CREATE TRIGGER notify_definitions AFTER INSERT OR UPDATE OR DELETE ON sequencer.sequences
    FOR EACH ROW EXECUTE FUNCTION sequencer.notify_definitions();
CREATE TRIGGER notify_truncate AFTER TRUNCATE ON sequencer.sequences
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.notify_definitions();


-- functions for applications --------------------------------------------------------------------

CREATE FUNCTION sequencer.enroll(
    sequence text, subject text, data jsonb DEFAULT NULL, timezone text DEFAULT NULL,
    wake_at timestamptz DEFAULT NULL, step text DEFAULT NULL
) RETURNS bigint
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO sequencer.enrollments (sequence, subject, data, timezone, wake_at, step)
    VALUES (enroll.sequence, enroll.subject, enroll.data, enroll.timezone, enroll.wake_at, enroll.step)
    ON CONFLICT DO NOTHING
    RETURNING id
$$;

COMMENT ON FUNCTION sequencer.enroll IS 'Enroll a subject and return the id; NULL if the reentry policy refuses.';

-- The items that collect() and merge() add to data are limited in number; `collecting` counts all of them.
CREATE FUNCTION sequencer.add_items(
    data jsonb, items jsonb, count bigint, since timestamptz, last timestamptz, at_most integer
) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    present CONSTANT jsonb := coalesce(nullif(data->'items', 'null'), '[]');
    known CONSTANT jsonb := CASE WHEN jsonb_typeof(data->'collecting') = 'object' THEN data->'collecting' END;
BEGIN
    IF jsonb_typeof(present) <> 'array' THEN
        RAISE datatype_mismatch USING
            MESSAGE = 'items cannot be collected: data.items is not a list',
            HINT = 'Give that key of data another name.';
    END IF;
    RETURN data || jsonb_build_object(
        'items', present || (
            SELECT coalesce(jsonb_agg(item ORDER BY number), '[]')
              FROM jsonb_array_elements(items) WITH ORDINALITY AS added (item, number)
             WHERE number <= at_most - jsonb_array_length(present)),
        'collecting', jsonb_build_object(
            'count', coalesce((known->>'count')::bigint, jsonb_array_length(present)) + count,
            'since', to_jsonb(least((known->>'since')::timestamptz, since)),
            'last', to_jsonb(greatest((known->>'last')::timestamptz, last))));
END $$;

CREATE FUNCTION sequencer.collect_at_most(sequence text) RETURNS integer
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(max(CASE WHEN s.config->>'at_most' ~ '^[0-9]{1,6}$'
                             THEN (s.config->>'at_most')::integer END), 1000)
      FROM sequencer.steps AS s WHERE s.sequence = collect_at_most.sequence AND s.type = 'Collect'
$$;

COMMENT ON FUNCTION sequencer.collect_at_most IS 'Return how many items an enrollment in a sequence keeps: at_most of its steps of type Collect.';

-- With the caller's rights, as an INSERT and an UPDATE would be.
CREATE FUNCTION sequencer.collect(
    sequence text, subject text, item jsonb, timezone text DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    at_most CONSTANT integer := sequencer.collect_at_most(collect.sequence);
    items CONSTANT jsonb := jsonb_build_array(collect.item);
    enrollment bigint;
    present timestamptz;
BEGIN
    -- where the reentry policy allows several enrollments, no constraint keeps two sessions from
    -- enrolling the subject at the same time
    IF EXISTS (SELECT FROM sequencer.sequences WHERE name = collect.sequence AND reentry = 'always') THEN
        PERFORM pg_advisory_xact_lock(hashtextextended(
            format('sequencer.collect %s %s', collect.sequence, collect.subject), 0));
    END IF;
    FOR attempt IN 1..100 LOOP
        SELECT e.id INTO enrollment FROM sequencer.enrollments AS e
         WHERE e.subject = collect.subject AND e.sequence = collect.sequence AND e.status = 'active'
         ORDER BY e.id DESC LIMIT 1 FOR NO KEY UPDATE;
        present := clock_timestamp();
        IF FOUND THEN
            UPDATE sequencer.enrollments AS e
               SET data = sequencer.add_items(e.data, items, 1, present, present, at_most)
             WHERE e.id = enrollment;
            RETURN enrollment;
        END IF;
        INSERT INTO sequencer.enrollments AS e (sequence, subject, data, timezone)
        VALUES (collect.sequence, collect.subject,
                sequencer.add_items('{}', items, 1, present, present, at_most),
                collect.timezone)
        ON CONFLICT DO NOTHING RETURNING e.id INTO enrollment;
        IF FOUND THEN
            RETURN enrollment;
        END IF;
        -- the enrollment that prevents it either has ended, or was inserted meanwhile
        IF EXISTS (SELECT FROM sequencer.enrollments AS e
                    WHERE e.subject = collect.subject AND e.sequence = collect.sequence
                      AND e.entry = 0 AND e.status <> 'active') THEN
            RETURN NULL;
        END IF;
    END LOOP;
    RAISE unique_violation USING
        MESSAGE = format('no item can be collected for subject %L in sequence %L: another '
                         'enrollment, which this user cannot see, is in the way',
                         collect.subject, collect.sequence),
        SCHEMA = 'sequencer', TABLE = 'enrollments', CONSTRAINT = 'one_entry';
END $$;

COMMENT ON FUNCTION sequencer.collect IS 'Add an item to data.items of the subject''s active enrollment, or enroll the subject with it. Return the id; NULL if the reentry policy refuses.';

-- Daemons may not insert enrollments themselves: schedules and Enroll steps use this function.
CREATE FUNCTION sequencer.enroll_all(
    sequences text[], subjects text[], data jsonb[], timezones text[], executed jsonb[]
) RETURNS TABLE (sequence text, subject text, step text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    INSERT INTO sequencer.enrollments AS e (sequence, subject, data, timezone, executed)
    SELECT n.sequence, n.subject, n.data, n.timezone,
           ARRAY(SELECT jsonb_array_elements_text(n.executed))
      FROM unnest(sequences, subjects, data, timezones, executed)
           AS n (sequence, subject, data, timezone, executed)
    ON CONFLICT DO NOTHING RETURNING e.sequence, e.subject, e.step;
END $$;

COMMENT ON FUNCTION sequencer.enroll_all IS 'Enroll subjects for a daemon, and return those that the reentry policy did not refuse. executed: the side effects executed before, without a wait since.';

CREATE FUNCTION sequencer.merge(from_subject text, into_subject text) RETURNS bigint
LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    lock_timeout CONSTANT text := current_setting('lock_timeout');
    give_up_at CONSTANT timestamptz := clock_timestamp() + interval '1 minute';
    reason CONSTANT text := nullif(current_setting('sequencer.reason', true), '');
    others CONSTANT text[] := ARRAY['items', 'collecting'];
    pair record;
    since timestamptz;
    last timestamptz;
    count bigint;
BEGIN
    IF from_subject = into_subject THEN
        RETURN 0;
    END IF;
    LOOP
        BEGIN
            -- enrollments inserted meanwhile would be locked in another order, so merges wait for each other
            IF NOT (SELECT bool_and(pg_try_advisory_xact_lock(
                        hashtextextended('sequencer.merge ' || subject, 0)))
                      FROM unnest(ARRAY[from_subject, into_subject]) AS subject) THEN
                RAISE lock_not_available USING
                    MESSAGE = 'another merge of one of the subjects is in progress';
            END IF;
            -- in a statement of its own, because Citus sends its nodes no settings of functions
            SET LOCAL lock_timeout = '1ms';
            PERFORM FROM sequencer.enrollments
              WHERE subject IN (from_subject, into_subject) ORDER BY id FOR UPDATE NOWAIT;
            FOR pair IN
                SELECT CASE WHEN f.is_further THEN a.id ELSE b.id END AS kept,
                       CASE WHEN f.is_further THEN b.id ELSE a.id END AS other,
                       CASE WHEN f.is_further THEN b.data ELSE a.data END AS data,
                       CASE WHEN f.is_further THEN b.timezone ELSE a.timezone END AS timezone,
                       sequencer.collect_at_most(a.sequence) AS at_most
                  FROM sequencer.enrollments AS a
                  JOIN sequencer.enrollments AS b ON b.subject = into_subject
                   AND b.sequence = a.sequence AND b.entry = 0
                 CROSS JOIN LATERAL (SELECT
                       (a.status <> 'active', a.visit, b.created_at, b.id)
                     > (b.status <> 'active', b.visit, a.created_at, a.id)) AS f (is_further)
                 WHERE a.subject = from_subject AND a.entry = 0
                 ORDER BY a.id
                   FOR UPDATE OF a, b NOWAIT -- also of what was enrolled since, with its last items
            LOOP
                -- Citus sends its nodes no set_config
                EXECUTE format('SET LOCAL sequencer.reason = %L', concat_ws('; ', format(
                    'merged into enrollment %s', pair.kept), reason));
                UPDATE sequencer.enrollments AS e
                   SET reentry = 'after_end',
                       status = CASE WHEN e.status = 'active' THEN 'cancelled' ELSE e.status END
                 WHERE e.id = pair.other;
                EXECUTE format('SET LOCAL sequencer.reason = %L', coalesce(reason, ''));
                IF jsonb_typeof(pair.data->'items') = 'array' THEN
                    since := pair.data->'collecting'->>'since';
                    last := pair.data->'collecting'->>'last';
                END IF;
                UPDATE sequencer.enrollments AS e
                   SET timezone = coalesce(e.timezone, pair.timezone),
                       data = CASE WHEN jsonb_typeof(pair.data->'items') = 'array'
                                    AND coalesce(jsonb_typeof(e.data->'items'), 'array') = 'array'
                           THEN sequencer.add_items(
                               pair.data - others || e.data, pair.data->'items',
                               greatest((pair.data->'collecting'->>'count')::bigint,
                                        jsonb_array_length(pair.data->'items')),
                               since, last, pair.at_most)
                           ELSE pair.data || e.data END
                 WHERE e.id = pair.kept AND e.status = 'active';
            END LOOP;
            UPDATE sequencer.enrollments SET subject = into_subject WHERE subject = from_subject;
            GET DIAGNOSTICS count = ROW_COUNT;
            EXECUTE format('SET LOCAL lock_timeout = %L', lock_timeout);
            RETURN count;
        EXCEPTION WHEN unique_violation OR lock_not_available OR deadlock_detected THEN
            -- one is locked, or is being enrolled: nothing is locked while waiting for it, so that no deadlock
            -- fails the other session. (Only the index can tell that one is being enrolled: it waits for 1 ms.)
            IF clock_timestamp() > give_up_at THEN
                RAISE;
            END IF;
        END;
        PERFORM pg_sleep(0.005 + random() * 0.02);
    END LOOP;
END $$;

COMMENT ON FUNCTION sequencer.merge IS 'Change the subject of all enrollments of one subject to another, and return how many. If both are in a sequence that allows one enrollment, the one further along is kept, with the data of both, and the other is cancelled.';

-- In plpgsql, which plans the statement for the given arguments.
CREATE FUNCTION sequencer.reevaluate(
    subject text DEFAULT NULL, sequence text DEFAULT NULL, step text DEFAULT NULL,
    ids bigint[] DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    count bigint;
BEGIN
    WITH woken AS (
        UPDATE sequencer.enrollments AS e SET wake_at = least(e.wake_at, now())
         WHERE e.status = 'active' AND e.leased_by IS NULL
           -- an enrollment that starts later keeps its time; after a load without notifications, it is due unnoticed
           AND (e.entered_at IS NOT NULL OR e.wake_at <= now())
           AND (reevaluate.subject IS NULL OR e.subject = reevaluate.subject)
           AND (reevaluate.sequence IS NULL OR e.sequence = reevaluate.sequence)
           AND (reevaluate.step IS NULL OR e.step = reevaluate.step)
           AND (reevaluate.ids IS NULL OR e.id = ANY (reevaluate.ids))
        RETURNING e.id, e.sequence, e.step, e.visit
    ), recorded AS (
        INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)
        SELECT w.id, clock_timestamp(), w.sequence, w.step, w.visit, 'reevaluated',
               sequencer.changed_by()
          FROM woken AS w WHERE current_setting('sequencer.reason', true) <> ''
    )
    SELECT count(*) INTO count FROM woken;
    RETURN count;
END $$;

COMMENT ON FUNCTION sequencer.reevaluate IS 'Wake waiting enrollments to be evaluated, and start those that are due, and return how many. Part of the transaction; recorded if a reason is set.';


-- shards ----------------------------------------------------------------------------------------

CREATE FUNCTION sequencer.shard_of(subject text, shards integer) RETURNS integer
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (('x' || encode(substr(sha256(convert_to(subject, 'UTF8')), 1, 4), 'hex'))::bit(32)::bigint
        % shards)::integer;

COMMENT ON FUNCTION sequencer.shard_of IS 'The number of the shard of a subject, from 0: the first four bytes of its SHA-256, as a big-endian number, modulo the number of shards.';

-- Written once, by migrate: settings with another number or order of shards are refused.
CREATE TABLE sequencer.shard (
    number integer PRIMARY KEY CHECK (number >= 0),
    shards integer NOT NULL CHECK (shards > number)
);
CREATE UNIQUE INDEX one_shard ON sequencer.shard ((true));

COMMENT ON TABLE  sequencer.shard IS 'Which of several shards this schema is: one row, from which the shard of a subject follows; no row if there is only one shard.';
COMMENT ON COLUMN sequencer.shard.number IS 'Its place in the order of [shards] in the settings, from 0.';
COMMENT ON COLUMN sequencer.shard.shards IS 'How many shards there are.';

-- A foreign table cannot call a function: inserting a row here does.
CREATE VIEW sequencer.reevaluations AS
    SELECT NULL::text AS subject, NULL::text AS sequence, NULL::text AS step WHERE false;

CREATE FUNCTION sequencer.reevaluate_row() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM sequencer.reevaluate(NEW.subject, NEW.sequence, NEW.step);
    RETURN NEW;
END $$;

CREATE TRIGGER reevaluate_row INSTEAD OF INSERT ON sequencer.reevaluations
    FOR EACH ROW EXECUTE FUNCTION sequencer.reevaluate_row();

COMMENT ON VIEW sequencer.reevaluations IS 'INSERT INTO sequencer.reevaluations (subject) VALUES (...) does what sequencer.reevaluate does, where only tables can be used, as through postgres_fdw.';


-- funnels ---------------------------------------------------------------------------------------

-- 64 enrollments that took an arm in the same visit are the bits of a number. This is a function because
-- PL/pgSQL runs no other queries in parallel than those whose rows it returns.
CREATE FUNCTION sequencer.arms_taken(sequence text, split text, since timestamptz)
RETURNS TABLE (block bigint, visit integer, arm text, members bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    by_weights CONSTANT boolean := ( -- whose arms are next and altNext
        SELECT NOT s.config ? 'ways' FROM sequencer.steps AS s
         WHERE s.sequence = arms_taken.sequence AND s.name = arms_taken.split);
BEGIN
    RETURN QUERY
    WITH taken AS (
        SELECT v.enrollment_id >> 6 AS block, v.visit,
               CASE WHEN by_weights AND v.action <> 'branch' THEN v.action ELSE v.message END AS arm,
               bit_or(1::bigint << (~v.enrollment_id & 63)::integer) AS members
          FROM sequencer.events AS v
         WHERE v.sequence = arms_taken.sequence AND v.step = arms_taken.split AND v.at >= arms_taken.since
           AND (v.action = 'branch' OR by_weights AND v.action IN ('next', 'altNext'))
         GROUP BY 1, 2, 3
    ), first_taken AS ( -- by an enrollment that comes back to the Split
        SELECT t.block, t.visit, t.arm, t.members & ~ coalesce(bit_or(t.members) OVER (
                   PARTITION BY t.block ORDER BY t.visit, t.arm
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS members
          FROM taken AS t
    )
    SELECT f.block, f.visit, f.arm, f.members FROM first_taken AS f WHERE f.members <> 0;
END $$;

COMMENT ON FUNCTION sequencer.arms_taken IS 'Return which arm of a Split enrollments took first since a time: those with the ids from 64 * block on, as bits of members, the first one in the highest bit.';

-- Reads the history since that time once, in parallel. Times are counted in classes of 1%, of a sample if
-- there are many: to sort them would take several times as long. JIT takes longer than it saves. The plan
-- has to know the variables: otherwise the planner expects few events, and does not count them in parallel.
-- It would also sort them, expecting few, and not read the arms in parallel, expecting many rows of workers.
CREATE FUNCTION sequencer.funnel(
    sequence text, since timestamptz DEFAULT NULL, split text DEFAULT NULL
) RETURNS TABLE (
    step text, way text, arm text, entered bigint, exited bigint, waiting bigint, failed bigint,
    cancelled bigint, suppressed bigint, goals bigint, median interval, p90 interval
)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
    SET jit = off SET work_mem = '128MB' SET plan_cache_mode = force_custom_plan SET enable_sort = off
    SET parallel_tuple_cost = 0.01 AS $$
#variable_conflict use_column
DECLARE
    of_sequence CONSTANT text := funnel.sequence;
    start CONSTANT timestamptz := coalesce(funnel.since, '-infinity');
    start_seconds CONSTANT float8 := date_part('epoch', start);
    a_day_later CONSTANT timestamptz := start + interval '1 day';
    ten_days_later CONSTANT timestamptz := start + interval '10 days';
    ends CONSTANT text[] := ARRAY['next', 'altNext', 'jump', 'branch', 'goal', 'suppressed', 'expired',
                                  'limited', 'moved', 'completed', 'failed', 'cancelled', 'resumed'];
    not_timed CONSTANT integer := -1000; -- instead of a class
    arms_of text;
    names text[]; -- of the arms
    arms integer[]; -- as indexes of their names; this array and the next three are rows of arms_taken
    visits integer[];
    blocks bigint[];
    members bigint[];
    first_visit integer;
    last_visit integer;
    low bigint;
    high bigint;
    is_dense boolean;
    codes bytea; -- if it is, of each enrollment from low to high a byte: its arm, and since which visit
    not_sampled integer; -- bits that are 0 in hashes of the sample: ids may have a greater increment than 1
BEGIN
    IF NOT EXISTS (SELECT FROM sequencer.sequences AS q WHERE q.name = funnel.sequence) THEN
        RAISE undefined_object USING
            MESSAGE = format('sequence %L does not exist', of_sequence),
            HINT = 'SELECT name FROM sequencer.sequences lists all sequences.';
    END IF;
    SELECT s.name INTO arms_of
      FROM sequencer.steps AS s
     WHERE s.sequence = funnel.sequence AND s.type = 'Split'
       AND s.name = coalesce(funnel.split, s.name)
     ORDER BY s.position LIMIT 1;
    IF arms_of IS NULL AND funnel.split IS NOT NULL THEN
        RAISE undefined_object USING
            MESSAGE = format('sequence %L has no Split %L', of_sequence, funnel.split),
            HINT = 'Without split, the arms are those of its first Split.';
    END IF;
    SELECT (2 ^ ceil(log(2, greatest(1, sum(c.reltuples) / 500000)::numeric)))::integer - 1 INTO not_sampled
      FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'sequencer.events'::regclass;

    WITH taken AS (
        SELECT t.* FROM sequencer.arms_taken(of_sequence, arms_of, start) AS t
    ), names AS (
        SELECT array_agg(DISTINCT t.arm) AS all FROM taken AS t
    )
    SELECT min(n.all), array_agg(array_position(n.all, t.arm)), array_agg(t.visit), array_agg(t.block),
           array_agg(t.members), min(t.visit), max(t.visit), min(t.block) << 6, (max(t.block) << 6) + 63
      INTO names, arms, visits, blocks, members, first_visit, last_visit, low, high
      FROM taken AS t CROSS JOIN names AS n;
    -- To look an arm up in bytes takes a fifth of the time of a join.
    is_dense := low IS NULL OR high - low < 1 << 26
        AND (last_visit - first_visit + 1)::bigint * cardinality(names) < 256;
    IF is_dense THEN
        WITH bytes AS (
            SELECT a.block, bit_or(('x' || replace(replace(replace(
                       a.members::bit(64)::text, '1', 'x'), '0', '00'), 'x', c.code))::bit(512)) AS codes
              FROM unnest(blocks, visits, arms, members) AS a (block, visit, arm, members)
             CROSS JOIN LATERAL (
                   SELECT lpad(to_hex((a.visit - first_visit) * cardinality(names) + a.arm), 2, '0') AS code) AS c
             GROUP BY 1
        )
        SELECT string_agg(substr(bit_send(coalesce(b.codes, 0::bit(512))), 5), '' ORDER BY n) -- after a length
          INTO codes
          FROM generate_series(low >> 6, high >> 6) AS n LEFT JOIN bytes AS b ON b.block = n;
        blocks := NULL; -- whose text would be in the plan
        visits := NULL;
        arms := NULL;
        members := NULL;
    END IF;

    -- Each column to group by takes time, so the class of a time, the visit and the byte of the arm are one
    -- number. As a subquery, the codes are sent to workers once; otherwise they would be in each expression of
    -- the plan, as text.
    RETURN QUERY
    WITH left_visits AS NOT MATERIALIZED (
        SELECT v.enrollment_id AS id, v.visit, v.step COLLATE "C" AS step, v.seconds_at_step AS seconds,
               CASE WHEN v.action = 'next' THEN NULL -- most are, and NULL takes the least time to group by
                    WHEN v.action = 'branch' THEN 'branch ' || coalesce(v.message, '')
                    WHEN v.action = 'goal' THEN 'goal ' || coalesce(split_part(v.message, ' is met', 1), '')
                    ELSE v.action END COLLATE "C" AS way,
               CASE WHEN hashint8(v.enrollment_id) & not_sampled = 0
                    THEN (ln(greatest(v.seconds_at_step, 0.001::real)) * 100)::integer << 16
                    ELSE not_timed << 16 END AS class
          FROM sequencer.events AS v
         WHERE v.sequence = of_sequence AND v.seconds_at_step IS NOT NULL
           AND (v.message IS NOT NULL OR v.action <> 'completed') -- by hand alone
           AND (v.seconds_at_step < 86400 AND v.at >= a_day_later -- which needs no arithmetic
                OR v.seconds_at_step < 864000 AND v.at >= ten_days_later
                OR v.at >= start AND date_part('epoch', v.at) - v.seconds_at_step >= start_seconds)
    ), other_visits AS NOT MATERIALIZED ( -- still there, or to be subtracted
        SELECT e.id, e.visit, e.step, NULL::real, 'waiting' AS way, not_timed << 16 AS class
          FROM sequencer.enrollments AS e
         WHERE e.sequence = of_sequence AND e.status = 'active' AND e.entered_at >= start
        UNION ALL -- those that did not end in what they seemed to, as the enrollment was resumed or moved
        SELECT v.enrollment_id, v.visit, v.step, NULL, v.action || ' resumed', not_timed << 16
          FROM sequencer.events AS v
         WHERE v.sequence = of_sequence AND v.at >= start AND v.action IN ('failed', 'cancelled')
           AND date_part('epoch', v.at) - v.seconds_at_step >= start_seconds
           AND EXISTS (SELECT FROM sequencer.events AS l
                        WHERE l.enrollment_id = v.enrollment_id AND l.at > v.at AND l.action = ANY (ends))
    ), counted AS (
        SELECT v.step, v.way, count(*) AS times, min(v.seconds) AS seconds,
               v.class + CASE WHEN v.visit >= first_visit AND v.id BETWEEN low AND high
                              THEN CASE WHEN first_visit = last_visit THEN 0
                                        ELSE (least(v.visit, last_visit) - first_visit) << 8 END
                                   | get_byte((SELECT codes), (v.id - low)::integer)
                              ELSE 0 END AS code
          FROM left_visits AS v
         WHERE is_dense
         GROUP BY 1, 2, 5
        UNION ALL
        SELECT v.step, v.way, count(*), NULL,
               v.class + CASE WHEN v.visit >= first_visit AND v.id BETWEEN low AND high
                              THEN (least(v.visit, last_visit) - first_visit) << 8
                                   | get_byte((SELECT codes), (v.id - low)::integer)
                              ELSE 0 END
          FROM other_visits AS v
         WHERE is_dense
         GROUP BY 1, 2, 5
        UNION ALL
        SELECT v.step, v.way, count(*), min(v.seconds), v.class + coalesce(a.arm, 0)
          FROM (TABLE left_visits UNION ALL TABLE other_visits) AS v
          LEFT JOIN unnest(blocks, visits, arms, members) AS a (block, visit, arm, members)
            ON a.block = v.id >> 6 AND a.members >> (~v.id & 63)::integer & 1 = 1 AND a.visit <= v.visit
         WHERE NOT is_dense
         GROUP BY 1, 2, 5
    ), cells AS MATERIALIZED ( -- so that the conditions on it are not evaluated for each event
        SELECT c.step, split_part(w.way, ' ', 1) AS action, w.way, nullif(c.code >> 16, not_timed) AS class,
               CASE WHEN NOT is_dense THEN nullif(c.code & 65535, 0)
                    WHEN c.code & 255 > 0 AND c.code >> 8 & 255 >= ((c.code & 255) - 1) / cardinality(names)
                    THEN ((c.code & 255) - 1) % cardinality(names) + 1 END AS arm,
               CASE WHEN w.way IN ('failed resumed', 'cancelled resumed') THEN -c.times ELSE c.times END AS times,
               c.seconds
          FROM counted AS c CROSS JOIN LATERAL (SELECT coalesce(c.way, 'next') AS way) AS w
    ), ways AS (
        SELECT c.step, c.action, c.class, c.times, c.seconds,
               names[c.arm] AS arm,
               CASE WHEN c.action IN ('waiting', 'failed', 'cancelled') THEN NULL
                    WHEN c.action = 'branch' THEN substr(c.way, 8)
                    ELSE c.way END AS way,
               c.action = 'goal' OR (c.action = 'next' AND s.type = 'Goal') AS is_goal
          FROM cells AS c LEFT JOIN sequencer.steps AS s ON s.sequence = funnel.sequence AND s.name = c.step
         WHERE c.action = 'waiting' OR c.action = ANY (ends) AND c.action <> 'resumed'
    ), classes AS ( -- of each step (way NULL) and way, for all arms (arm NULL) and each
        SELECT w.step, w.way, w.arm, w.class, min(w.seconds) AS seconds, sum(w.times) AS times,
               sum(w.times) FILTER (WHERE w.way IS NOT NULL) AS exited,
               sum(w.times) FILTER (WHERE w.action = 'waiting') AS waiting,
               sum(w.times) FILTER (WHERE w.action = 'failed') AS failed,
               sum(w.times) FILTER (WHERE w.action = 'cancelled') AS cancelled,
               sum(w.times) FILTER (WHERE w.action = 'suppressed') AS suppressed,
               sum(w.times) FILTER (WHERE w.is_goal) AS goals
          FROM ways AS w
         GROUP BY w.step, w.class, GROUPING SETS ((w.way, w.arm), (w.way), (w.arm), ())
        HAVING (grouping(w.way) = 1 OR w.way IS NOT NULL) AND (grouping(w.arm) = 1 OR w.arm IS NOT NULL)
    ), ranks AS (
        SELECT c.*, sum(c.exited) FILTER (WHERE c.class IS NOT NULL) OVER up_to AS up_to,
               sum(c.exited) FILTER (WHERE c.class IS NOT NULL) OVER every AS every
          FROM classes AS c
        WINDOW every AS (PARTITION BY c.step, c.way, c.arm), up_to AS (every ORDER BY c.class)
    )
    SELECT r.step, r.way, r.arm, CASE WHEN r.way IS NULL THEN sum(r.times)::bigint END,
           coalesce(sum(r.exited), 0)::bigint,
           CASE WHEN r.way IS NULL THEN coalesce(sum(r.waiting), 0)::bigint END,
           CASE WHEN r.way IS NULL THEN coalesce(sum(r.failed), 0)::bigint END,
           CASE WHEN r.way IS NULL THEN coalesce(sum(r.cancelled), 0)::bigint END,
           coalesce(sum(r.suppressed), 0)::bigint, coalesce(sum(r.goals), 0)::bigint,
           make_interval(secs => round(min(r.seconds) FILTER (
               WHERE r.class IS NOT NULL AND r.up_to >= r.every * 0.5)::numeric, 3)::float8),
           make_interval(secs => round(min(r.seconds) FILTER (
               WHERE r.class IS NOT NULL AND r.up_to >= r.every * 0.9)::numeric, 3)::float8)
      FROM ranks AS r
      LEFT JOIN sequencer.steps AS s ON s.sequence = funnel.sequence AND s.name = r.step
      LEFT JOIN sequencer.sequences AS q ON q.name = s.sequence AND q.first_step = s.name
     GROUP BY r.step, r.way, r.arm, q.name, s.position
     ORDER BY q.name IS NULL, s.position NULLS LAST, r.step, r.arm NULLS FIRST, r.way NULLS FIRST;
END $$;

COMMENT ON FUNCTION sequencer.funnel IS 'Count, for each step (way NULL) and each way out of it, the visits that began since a time: for all enrollments (arm NULL), and for each arm of a Split (by default, of the first one). entered is the sum of exited, waiting, failed and cancelled. Times are accurate to 1%.';


-- privacy ---------------------------------------------------------------------------------------

-- runners/suppression_check.py computes the same, and checks for both forms of an address.
CREATE FUNCTION sequencer.suppression_hash(address text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
    SELECT 'sha256:' || encode(sha256(convert_to(address, 'UTF8')), 'hex')
$$;

COMMENT ON FUNCTION sequencer.suppression_hash IS 'Return the hash that replaces a forgotten address in suppressions, and still suppresses it.';

-- An address in the data is the subject's, wherever it is. In messages it may belong to others, such as the
-- sender's, so those only serve to find suppressions.
CREATE FUNCTION sequencer.terms_of(subject text) RETURNS TABLE (kind text, term text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH texts (value, is_own) AS (
        SELECT terms_of.subject, true
        UNION
        SELECT v.value #>> '{}', true
          FROM sequencer.enrollments AS e, jsonb_path_query(e.data, 'strict $.**') AS v (value)
         WHERE e.subject = terms_of.subject AND jsonb_typeof(v.value) IN ('string', 'number')
        UNION
        SELECT v.message, false
          FROM sequencer.enrollments AS e JOIN sequencer.events AS v ON v.enrollment_id = e.id
         WHERE e.subject = terms_of.subject AND v.message LIKE '%@%'
        UNION
        SELECT e.last_error, false FROM sequencer.enrollments AS e
         WHERE e.subject = terms_of.subject AND e.last_error LIKE '%@%'
        UNION -- what other shards hold of it
        SELECT t.value, t.is_own
          FROM jsonb_to_recordset(nullif(current_setting('sequencer.texts', true), '')::jsonb)
               AS t (value text, is_own boolean)
    )
    SELECT CASE WHEN is_own THEN 'email' ELSE 'message' END, lower(rtrim(m.found[1], '.'))
      FROM texts, regexp_matches(value, '[^[:space:]<>,;:"''()]+@[^[:space:]<>,;:"''()]+', 'g') AS m (found)
    UNION
    SELECT 'phone', regexp_replace(replace(value, '(0)', ''), '[^0-9]', '', 'g') FROM texts
     WHERE is_own AND value ~ '^\s*(\+|00)[0-9 ()./-]{6,30}\s*$'
    UNION
    SELECT 'digits', regexp_replace(replace(value, '(0)', ''), '[^0-9]', '', 'g') FROM texts
     WHERE is_own AND value ~ '^[0-9 ()./-]{7,30}$'
    UNION
    SELECT 'value', lower(btrim(value)) FROM texts
     WHERE is_own AND octet_length(value) BETWEEN 1 AND 1000
    UNION -- as addresses of custom runners are kept
    SELECT 'verbatim', btrim(value, E' \t\r\n\u00a0\u3000') FROM texts
     WHERE is_own AND octet_length(value) BETWEEN 1 AND 1000
$$;

COMMENT ON FUNCTION sequencer.terms_of IS 'Return the terms that identify a subject in the data of its enrollments: addresses, numbers, and all values.';

CREATE FUNCTION sequencer.addresses_of(subject text) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH terms AS MATERIALIZED (SELECT * FROM sequencer.terms_of(addresses_of.subject)), forms (form) AS (
        SELECT term FROM terms WHERE kind IN ('email', 'message', 'value', 'verbatim')
        UNION SELECT prefix || term FROM terms, unnest(ARRAY['', '+', '00']) AS prefix
               WHERE kind IN ('phone', 'digits')
    )
    SELECT form FROM forms UNION ALL SELECT sequencer.suppression_hash(form) FROM forms
$$;

COMMENT ON FUNCTION sequencer.addresses_of IS 'Return all forms in which a subject''s addresses may be in suppressions, in clear and as hashes.';

CREATE FUNCTION sequencer.suppressions_of(subject text) RETURNS SETOF sequencer.suppressions
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.* FROM sequencer.suppressions AS s
     WHERE s.address IN (SELECT sequencer.addresses_of(suppressions_of.subject))
$$;

COMMENT ON FUNCTION sequencer.suppressions_of IS 'Return the suppressions of a subject''s addresses, in clear or as hashes.';

-- Matches only whole words; a short subject, such as 7, only where messages of sequencerd quote it.
CREATE FUNCTION sequencer.mentions_of(subject text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT string_agg(pattern, '|') FROM (
        SELECT CASE WHEN length(word) < 5
            THEN '(?<='')' || word || '(?='')|(?<=\mfrom )' || word || '(?= to )|(?<= to )' || word
                 || '(?= by )'
            ELSE '(?<![[:alnum:]_.@+-])' || word || '(?![[:alnum:]_@-]|\.[[:alnum:]])' END
          FROM (SELECT mentions_of.subject AS text
                UNION SELECT term FROM sequencer.terms_of(mentions_of.subject) WHERE kind = 'email') AS t,
               regexp_replace(t.text, '([][!-/:-@^_`{-~\\])', '\\\1', 'g') AS word
        UNION ALL
        SELECT '(?<![0-9])' || array_to_string(regexp_split_to_array(term, ''), '[ ()./-]*') || '(?![0-9])'
          FROM sequencer.terms_of(mentions_of.subject) WHERE kind = 'phone') AS patterns (pattern)
$$;

COMMENT ON FUNCTION sequencer.mentions_of IS 'Return a regular expression for a subject and its addresses in a text.';

-- LIKE takes a tenth of the time of the regular expression, which is compared only with texts that have an
-- outline. lower(... COLLATE "C") folds the case of ASCII letters alone, so of a word the longest part in
-- ASCII is searched; of a number the digits, whatever is between them.
CREATE FUNCTION sequencer.outlines_of(subject text) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT array_agg(DISTINCT outline) FROM (
        SELECT '%' || regexp_replace(lower(longest.part COLLATE "C"), '([%_\\])', '\\\1', 'g') || '%'
          FROM (SELECT outlines_of.subject AS text
                UNION SELECT term FROM sequencer.terms_of(outlines_of.subject) WHERE kind = 'email') AS t
         CROSS JOIN LATERAL (
               SELECT part FROM regexp_split_to_table(t.text, '[^\x01-\x7f]+') AS part
                ORDER BY length(part) DESC LIMIT 1) AS longest
        UNION ALL
        SELECT '%' || array_to_string(regexp_split_to_array(term, ''), '%') || '%'
          FROM sequencer.terms_of(outlines_of.subject) WHERE kind = 'phone') AS outlines (outline)
$$;

COMMENT ON FUNCTION sequencer.outlines_of IS 'Return patterns for LIKE, of which each text that mentions_of matches has one, in lower case.';

CREATE FUNCTION sequencer.mentioned_in(subject text, pattern text, outlines text[]) RETURNS bigint[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(array_agg(id ORDER BY id), '{}') FROM (
        SELECT e.id
          FROM sequencer.enrollments AS e
         WHERE e.subject <> mentioned_in.subject
           AND CASE WHEN lower(concat(e.subject, ' ', e.data) COLLATE "C") LIKE ANY (mentioned_in.outlines)
                    THEN e.data::text ~* mentioned_in.pattern OR e.subject ~* mentioned_in.pattern END
         ORDER BY e.id LIMIT 1000) AS found
$$;

COMMENT ON FUNCTION sequencer.mentioned_in IS 'Return the enrollments of other subjects whose data match, at most 1000.';

-- Deletes what belongs to a subject, and removes its name from what belongs to others. One at a time: two
-- would wait for each other's rows.
CREATE FUNCTION sequencer.forget(
    subject text, OUT enrollments bigint, OUT events bigint, OUT suppressions bigint,
    OUT redacted bigint, OUT mentioned_in bigint[]
) LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    pattern text;
    outlines text[];
    ids bigint[];
    busy record;
    place record;
    count bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(7364528, 7);
    PERFORM FROM sequencer.enrollments AS e WHERE e.subject = forget.subject ORDER BY e.id FOR UPDATE;
    SELECT e.id, e.sequence, e.step, e.leased_by INTO busy
      FROM sequencer.enrollments AS e LEFT JOIN sequencer.daemons AS d ON d.name = e.leased_by
     WHERE e.subject = forget.subject AND e.leased_by IS NOT NULL
       AND greatest(e.wake_at, d.alive_until) > clock_timestamp() LIMIT 1;
    IF FOUND THEN
        RAISE object_in_use USING
            MESSAGE = format('nothing was forgotten: enrollment %s is executing step %L of sequence %L',
                             busy.id, busy.step, busy.sequence),
            SCHEMA = 'sequencer', TABLE = 'enrollments', COLUMN = 'leased_by',
            HINT = format('Try again when the side effect, or its daemon %s, has ended.', busy.leased_by);
    END IF;
    SELECT coalesce(array_agg(e.id), '{}') INTO ids
      FROM sequencer.enrollments AS e WHERE e.subject = forget.subject;
    pattern := sequencer.mentions_of(forget.subject);
    outlines := sequencer.outlines_of(forget.subject);

    WITH gone AS (
        DELETE FROM sequencer.suppressions AS s USING sequencer.suppressions_of(forget.subject) AS o
         WHERE s.channel = o.channel AND s.address = o.address AND s.address !~ '^sha256:[0-9a-f]{64}$'
        RETURNING s.*
    ), kept AS (
        INSERT INTO sequencer.suppressions (channel, address, topic, source, created_at)
        SELECT channel, sequencer.suppression_hash(address), topic, source, created_at FROM gone
        ON CONFLICT DO NOTHING
    )
    SELECT count(*) INTO suppressions FROM gone;
    DELETE FROM sequencer.events AS v WHERE v.enrollment_id = ANY (ids);
    GET DIAGNOSTICS events = ROW_COUNT;
    DELETE FROM sequencer.problems AS p
     WHERE p.kind = 'quarantined' AND p.about = ANY (ids::text[]);
    DELETE FROM sequencer.reservations AS r
     WHERE r.enrollments && ids AND ids @> r.enrollments; -- what others count with it, only hashes name
    DELETE FROM sequencer.enrollments AS e WHERE e.id = ANY (ids);
    GET DIAGNOSTICS enrollments = ROW_COUNT;

    redacted := 0;
    FOR place IN VALUES
        ('events', 'message'), ('enrollments', 'last_error'), ('problems', 'message'),
        ('scheduled_runs', 'problem'), ('suppressions', 'reason'), ('revisions', 'reason'),
        ('removed_suppressions', 'reason')
    LOOP
        EXECUTE format('UPDATE sequencer.%I SET %2$I = regexp_replace(%2$I, $1, ''[forgotten]'', ''gi'')'
                       ' WHERE CASE WHEN lower(%2$I COLLATE "C") LIKE ANY ($2) THEN %2$I ~* $1 END',
                       place.column1, place.column2) USING pattern, outlines;
        GET DIAGNOSTICS count = ROW_COUNT;
        redacted := redacted + count;
    END LOOP;
    mentioned_in := sequencer.mentioned_in(forget.subject, pattern, outlines);
END $$;

COMMENT ON FUNCTION sequencer.forget IS 'Delete the enrollments of a subject and their history, replace its suppressed addresses by hashes, and remove its name and addresses from the messages of others. mentioned_in: enrollments of other subjects whose data name it; these are left as they are.';

CREATE FUNCTION sequencer.export_subject(subject text) RETURNS jsonb
LANGUAGE sql STABLE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object(
        'subject', export_subject.subject, 'exported_at', now(),
        'enrollments', (
            SELECT coalesce(jsonb_agg(to_jsonb(e) || jsonb_build_object('history', (
                       SELECT coalesce(jsonb_agg(to_jsonb(v) - 'enrollment_id' ORDER BY v.visit, v.at), '[]')
                         FROM sequencer.events AS v WHERE v.enrollment_id = e.id)) ORDER BY e.id), '[]')
              FROM sequencer.enrollments AS e WHERE e.subject = export_subject.subject),
        'suppressions', (
            SELECT coalesce(jsonb_agg(to_jsonb(s) ORDER BY s.channel, s.address), '[]')
              FROM sequencer.suppressions_of(export_subject.subject) AS s),
        'removed_suppressions', (
            SELECT coalesce(jsonb_agg(to_jsonb(s) - 'id' ORDER BY s.id), '[]')
              FROM sequencer.removed_suppressions AS s
             WHERE s.address IN (SELECT sequencer.addresses_of(export_subject.subject))),
        'problems', (
            SELECT coalesce(jsonb_agg(to_jsonb(p) ORDER BY p.since), '[]')
              FROM sequencer.problems AS p JOIN sequencer.enrollments AS e ON e.id::text = p.about
             WHERE p.kind = 'quarantined' AND e.subject = export_subject.subject),
        'mentioned_in', sequencer.mentioned_in(
            export_subject.subject, sequencer.mentions_of(export_subject.subject),
            sequencer.outlines_of(export_subject.subject)))
$$;

COMMENT ON FUNCTION sequencer.export_subject IS 'Return what is held of a subject: its enrollments with data and history, the suppressions of its addresses, problems, and the ids of other enrollments that name it in their data.';


-- views -----------------------------------------------------------------------------------------

CREATE VIEW sequencer.overview AS
SELECT s.sequence, s.name AS step, s.type, q.status,
       coalesce(a.active, 0) AS active,
       coalesce(a.due, 0) AS due,
       coalesce(a.overdue, 0) AS overdue,
       a.next_wake_at,
       coalesce(f.failed, 0) AS failed,
       CASE WHEN s.reschedule_from IS NOT NULL THEN (
           SELECT count(*) FROM sequencer.enrollments AS e
            WHERE e.sequence = s.sequence AND e.step = s.name AND e.status = 'active'
              AND e.id >= s.reschedule_from) END AS rescheduling,
       CASE WHEN s.type IN ('Switch', 'Split') THEN (
           SELECT jsonb_object_agg(b.branch, b.times)
             FROM (SELECT v.message AS branch, count(*) AS times FROM sequencer.events AS v
                    WHERE v.sequence = s.sequence COLLATE "default"
                      AND v.step = s.name COLLATE "default" AND v.action = 'branch'
                    GROUP BY v.message) AS b) END AS branches,
       s.problem
  FROM sequencer.steps AS s
  JOIN sequencer.sequences AS q ON q.name = s.sequence
  LEFT JOIN (
      SELECT sequence, step, count(*) AS active, min(wake_at) AS next_wake_at,
             count(*) FILTER (WHERE wake_at <= now()) AS due,
             count(*) FILTER (WHERE wake_at < now() - interval '1 minute') AS overdue
        FROM sequencer.enrollments WHERE status = 'active' GROUP BY sequence, step
  ) AS a ON a.sequence = s.sequence AND a.step = s.name
  LEFT JOIN (
      SELECT sequence, step, count(*) AS failed
        FROM sequencer.enrollments WHERE status = 'failed' GROUP BY sequence, step
  ) AS f ON f.sequence = s.sequence AND f.step = s.name
 ORDER BY s.sequence, s.position;

COMMENT ON VIEW sequencer.overview IS 'For each step: how many enrollments are active, due, and overdue by more than a minute; when the next one wakes; how many failed; after a change of the step, how many have yet to be evaluated; and how many took each branch of a Switch or of a Split with ways, according to the history.';

CREATE VIEW sequencer.overdue AS
SELECT e.id, e.sequence, e.step, e.subject, e.wake_at, now() - e.wake_at AS overdue_by,
       e.attempt, e.leased_by, e.last_error
  FROM sequencer.enrollments AS e
  LEFT JOIN sequencer.sequences AS q ON q.name = e.sequence
 WHERE e.status = 'active' AND e.wake_at < now() - interval '1 minute'
   AND q.status IS DISTINCT FROM 'paused'
   AND NOT EXISTS (
       SELECT FROM sequencer.steps AS s
         JOIN sequencer.problems AS p ON p.kind = 'runner' AND p.about = s.type
         JOIN sequencer.daemons AS d ON d.name = p.daemon AND d.alive_until > now()
        WHERE s.sequence = e.sequence AND s.name = e.step)
 ORDER BY e.wake_at;

COMMENT ON VIEW sequencer.overdue IS 'Enrollments overdue by more than a minute: no daemon runs, or it cannot keep up. Those that wait for a runner that is down are excluded: see sequencer.problems.';

CREATE VIEW sequencer.schedules AS
SELECT q.name AS sequence, q.status, q.enroll->>'from' AS source,
       coalesce(q.enroll->>'schedule', concat_ws(' ', 'every', q.enroll->'every'->>'amount',
                                                 q.enroll->'every'->>'unit')) AS schedule,
       coalesce((q.enroll->>'at_most')::integer, 1000) AS at_most,
       r.next_run_at, r.last_run_at, r.duration, r.found, r.enrolled, r.problem
  FROM sequencer.sequences AS q LEFT JOIN sequencer.scheduled_runs AS r ON r.sequence = q.name
 WHERE q.enroll IS NOT NULL ORDER BY q.name;

COMMENT ON VIEW sequencer.schedules IS 'Sequences that enroll what a query returns: by which schedule, how long the last run took, how many it enrolled, and its problem.';

CREATE VIEW sequencer.failures AS
SELECT id, sequence, step, subject, failure, last_error, ended_at AS failed_at
  FROM sequencer.enrollments WHERE status = 'failed' ORDER BY ended_at DESC;

COMMENT ON VIEW sequencer.failures IS 'Failed enrollments, and why they failed; the latest first.';


-- roles -----------------------------------------------------------------------------------------

-- Trigger functions as well: on another table, they would write to these tables with the owner's rights.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA sequencer FROM PUBLIC;

-- Roles belong to the whole cluster, and some ways of copying a database lose privileges. So missing ones
-- are determined by comparison, and granted again by every `sequencerd migrate`. An
-- administrator can do the same in psql: SELECT statement FROM sequencer.missing_grants \gexec
CREATE VIEW sequencer.missing_grants AS
WITH roles (role) AS (
    VALUES ('sequencer_enroller'), ('sequencer_editor'), ('sequencer_daemon'), ('sequencer_privacy')
), relations AS (
    SELECT oid, relname::text AS name, relkind FROM pg_class
     WHERE relnamespace = 'sequencer'::regnamespace AND relkind IN ('r', 'p', 'v')
       AND (NOT relispartition OR relname = 'events_other') -- which doctor reads
), functions AS (
    SELECT oid, proname::text AS name, oid::regprocedure::text AS signature FROM pg_proc
     WHERE pronamespace = 'sequencer'::regnamespace
), columns AS (
    SELECT attname::text AS name FROM pg_attribute
     WHERE attrelid = 'sequencer.enrollments'::regclass AND attnum > 0 AND NOT attisdropped
), on_relations (role, privilege, relation) AS (
    SELECT role, 'SELECT', name FROM relations, roles
     WHERE role = 'sequencer_daemon' OR role = 'sequencer_enroller' AND name <> 'console_sessions'
    UNION ALL VALUES
    ('sequencer_privacy', 'SELECT', 'migrations'),
    ('sequencer_privacy', 'SELECT', 'shard'),
    ('sequencer_enroller', 'INSERT', 'reevaluations'),
    ('sequencer_enroller', 'INSERT', 'suppressions'),
    ('sequencer_enroller', 'DELETE', 'suppressions'),
    ('sequencer_editor', 'INSERT', 'sequences'),
    ('sequencer_editor', 'UPDATE', 'sequences'),
    ('sequencer_editor', 'DELETE', 'sequences'),
    ('sequencer_editor', 'INSERT', 'steps'),
    ('sequencer_editor', 'UPDATE', 'steps'),
    ('sequencer_editor', 'DELETE', 'steps'),
    ('sequencer_editor', 'INSERT', 'topics'),
    ('sequencer_editor', 'UPDATE', 'topics'),
    ('sequencer_editor', 'DELETE', 'topics'),
    ('sequencer_editor', 'INSERT', 'holidays'),
    ('sequencer_editor', 'UPDATE', 'holidays'),
    ('sequencer_editor', 'DELETE', 'holidays'),
    ('sequencer_daemon', 'INSERT', 'suppressions'),
    ('sequencer_daemon', 'DELETE', 'suppressions'),
    ('sequencer_daemon', 'INSERT', 'daemons'),
    ('sequencer_daemon', 'UPDATE', 'daemons'),
    ('sequencer_daemon', 'DELETE', 'daemons'),
    ('sequencer_daemon', 'INSERT', 'scheduled_runs'),
    ('sequencer_daemon', 'UPDATE', 'scheduled_runs'),
    ('sequencer_daemon', 'INSERT', 'problems'),
    ('sequencer_daemon', 'UPDATE', 'problems'),
    ('sequencer_daemon', 'DELETE', 'problems'),
    ('sequencer_daemon', 'INSERT', 'reservations'),
    ('sequencer_daemon', 'UPDATE', 'reservations'),
    ('sequencer_daemon', 'DELETE', 'reservations'),
    ('sequencer_daemon', 'INSERT', 'rates'),
    ('sequencer_daemon', 'UPDATE', 'rates'),
    ('sequencer_daemon', 'UPDATE', 'brakes'),
    ('sequencer_daemon', 'INSERT', 'activity'),
    ('sequencer_daemon', 'UPDATE', 'activity'),
    ('sequencer_daemon', 'DELETE', 'activity'),
    ('sequencer_daemon', 'INSERT', 'activity_progress'),
    ('sequencer_daemon', 'UPDATE', 'activity_progress'),
    ('sequencer_daemon', 'INSERT', 'lateness'),
    ('sequencer_daemon', 'DELETE', 'lateness'),
    ('sequencer_daemon', 'INSERT', 'console_sessions'),
    ('sequencer_daemon', 'DELETE', 'console_sessions')
), on_columns (role, privilege, relation, name) AS (
    -- INSERT on each column instead of the table, so that the triggers as_granted and of_today check rows
    SELECT 'sequencer_enroller', 'INSERT', 'enrollments', name FROM columns
    UNION ALL
    SELECT 'sequencer_enroller', 'UPDATE', 'enrollments', unnest(ARRAY['data', 'timezone', 'status'])
    UNION ALL
    SELECT 'sequencer_editor', 'UPDATE', 'scheduled_runs', 'next_run_at'
    UNION ALL
    SELECT 'sequencer_editor', 'UPDATE', 'enrollments', unnest(ARRAY['sequence', 'step', 'subject', 'wake_at'])
    UNION ALL -- the state of an enrollment, and not its identity
    SELECT 'sequencer_daemon', 'UPDATE', 'enrollments', name FROM columns
     WHERE name NOT IN ('id', 'subject', 'timezone', 'reentry', 'created_at', 'tag', 'original_id', 'entry')
    UNION ALL
    SELECT 'sequencer_daemon', 'INSERT', 'events', attname::text FROM pg_attribute
     WHERE attrelid = 'sequencer.events'::regclass AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT 'sequencer_daemon', 'UPDATE', 'steps', unnest(ARRAY['problem', 'reschedule_from', 'reschedule_again'])
), on_functions (role, name) AS (
    VALUES
    ('sequencer_enroller', 'reevaluate'),
    ('sequencer_enroller', 'shard_of'),
    ('sequencer_enroller', 'reevaluate_row'),
    ('sequencer_enroller', 'enroll'),
    ('sequencer_enroller', 'collect'),
    ('sequencer_enroller', 'collect_at_most'),
    ('sequencer_enroller', 'add_items'),
    ('sequencer_enroller', 'merge'),
    ('sequencer_enroller', 'document'),
    ('sequencer_enroller', 'named_steps'),
    ('sequencer_enroller', 'as_duration'),
    ('sequencer_enroller', 'reentry_time'),
    ('sequencer_enroller', 'suppression_hash'),
    ('sequencer_enroller', 'funnel'),
    ('sequencer_enroller', 'arms_taken'),
    ('sequencer_privacy', 'forget'),
    ('sequencer_privacy', 'export_subject'),
    ('sequencer_daemon', 'reevaluate'),
    ('sequencer_daemon', 'document'),
    ('sequencer_daemon', 'suppression_hash'),
    ('sequencer_daemon', 'as_duration'),
    ('sequencer_daemon', 'reentry_time'),
    ('sequencer_daemon', 'add_event_partitions'),
    ('sequencer_daemon', 'drop_event_partition'),
    ('sequencer_daemon', 'enroll_all'),
    ('sequencer_daemon', 'reserve'),
    ('sequencer_daemon', 'take_permits'),
    ('sequencer_daemon', 'brake'),
    ('sequencer_daemon', 'brake_of'),
    ('sequencer_enroller', 'brake_of'),
    ('sequencer_daemon', 'delete_ended')
), statements (phase, role, statement) AS (
    SELECT 1, role, format('CREATE ROLE %I NOLOGIN', role) FROM roles WHERE to_regrole(role) IS NULL
    UNION ALL
    SELECT 2, 'sequencer_editor', 'GRANT sequencer_enroller TO sequencer_editor'
     WHERE pg_has_role(to_regrole('sequencer_editor'), to_regrole('sequencer_enroller'), 'USAGE') IS NOT TRUE
    UNION ALL
    SELECT 3, role, format('GRANT USAGE ON SCHEMA sequencer TO %I', role)
      FROM roles WHERE role <> 'sequencer_editor'
       AND has_schema_privilege(to_regrole(role), 'sequencer'::regnamespace, 'USAGE') IS NOT TRUE
    UNION ALL
    SELECT 4, role, format('GRANT %s ON sequencer.%I TO %I', privilege, relation, role)
      FROM on_relations JOIN relations AS r ON r.name = relation
     WHERE has_table_privilege(to_regrole(role), r.oid, privilege) IS NOT TRUE
    UNION ALL
    SELECT 5, role, format('GRANT %s (%s) ON sequencer.%I TO %I', privilege,
                           string_agg(quote_ident(c.name), ', ' ORDER BY c.name), relation, role)
      FROM on_columns AS c JOIN relations AS r ON r.name = relation
     WHERE has_column_privilege(to_regrole(role), r.oid, c.name, privilege) IS NOT TRUE
     GROUP BY role, privilege, relation
    UNION ALL -- for the trigger as_granted
    SELECT 6, 'sequencer_enroller', 'GRANT SELECT ON SEQUENCE sequencer.enrollments_id_seq TO sequencer_enroller'
     WHERE has_sequence_privilege(to_regrole('sequencer_enroller'), 'sequencer.enrollments_id_seq',
                                  'SELECT') IS NOT TRUE
    UNION ALL -- Citus, which has a trigger on each of its tables, takes ids with the rights of the user
    SELECT 6, role, format('GRANT USAGE ON SEQUENCE sequencer.%I TO %I', name, role)
      FROM (VALUES ('sequencer_enroller', 'enrollments_id_seq'),
                   ('sequencer_editor', 'steps_position_seq')) AS s (role, name)
     WHERE has_sequence_privilege(to_regrole(role), format('sequencer.%I', name), 'USAGE') IS NOT TRUE
       AND EXISTS (SELECT FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
                    WHERE t.tgrelid = 'sequencer.enrollments'::regclass AND p.proname = 'citus_truncate_trigger')
    UNION ALL
    SELECT 7, role, format('GRANT EXECUTE ON FUNCTION %s TO %I', signature, role)
      FROM on_functions JOIN functions AS f USING (name)
     WHERE has_function_privilege(to_regrole(role), f.oid, 'EXECUTE') IS NOT TRUE
        OR has_function_privilege('public', f.oid, 'EXECUTE') -- until the next statements
    UNION ALL
    SELECT 8, 'public', format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', signature)
      FROM functions WHERE has_function_privilege('public', oid, 'EXECUTE')
    -- If row-level security is enabled on a table, the daemon continues to see all of its rows. Until
    -- then the policy has no effect, and it applies to no other role.
    UNION ALL
    SELECT 9, 'sequencer_daemon', format('CREATE POLICY sequencer_daemon ON sequencer.%I TO sequencer_daemon'
                                         ' USING (true) WITH CHECK (true)', name)
      FROM relations AS r WHERE relkind <> 'v' AND NOT EXISTS (
           SELECT FROM pg_policy WHERE polrelid = r.oid AND polname = 'sequencer_daemon')
)
SELECT role, statement || ';' AS statement FROM statements ORDER BY phase, role, statement;

COMMENT ON VIEW sequencer.missing_grants IS 'What the roles of sequencerd lack, and the statements that grant it. Empty when all is granted.';
