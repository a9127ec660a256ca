-- One table for all shards, by postgres_fdw: the partition of a row is the shard of its subject.
CREATE EXTENSION IF NOT EXISTS postgres_fdw;
CREATE SCHEMA sequencer;

CREATE FUNCTION sequencer.shard_of(subject text, shards integer) RETURNS integer
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (('x' || encode(substr(sha256(convert_to(subject, 'UTF8')), 1, 4), 'hex'))::bit(32)::bigint
        % shards)::integer;

CREATE TABLE sequencer.enrollments (
    id         bigint,
    sequence   text COLLATE "C" NOT NULL,
    step       text COLLATE "C",
    subject    text COLLATE "C" NOT NULL,
    data       jsonb,
    timezone   text,
    status     text,
    wake_at    timestamptz,
    failure    text,
    last_error text,
    created_at timestamptz,
    ended_at   timestamptz
) PARTITION BY LIST (sequencer.shard_of(subject, ${shards}));

-- postgres_fdw does not move rows: with another subject, this one would stay in the wrong shard.
CREATE FUNCTION sequencer.refuse_another_subject() RETURNS trigger LANGUAGE plpgsql AS $$$$
BEGIN
    RAISE feature_not_supported USING
        MESSAGE = 'the subject cannot be changed here: the enrollment would not move to its shard',
        HINT = 'Leave the column subject out of the UPDATE.';
END $$$$;

CREATE TRIGGER refuse_another_subject BEFORE UPDATE OF subject ON sequencer.enrollments
    FOR EACH STATEMENT EXECUTE FUNCTION sequencer.refuse_another_subject();

CREATE TABLE sequencer.reevaluations (
    subject  text COLLATE "C" NOT NULL,
    sequence text COLLATE "C",
    step     text COLLATE "C"
) PARTITION BY LIST (sequencer.shard_of(subject, ${shards}));

-- for each shard: its server, the login there, and its partitions
CREATE SERVER ${server} FOREIGN DATA WRAPPER postgres_fdw
    OPTIONS (${server_options});
CREATE USER MAPPING FOR PUBLIC SERVER ${server} OPTIONS (${user_options});
CREATE FOREIGN TABLE sequencer.${enrollments} PARTITION OF sequencer.enrollments
    FOR VALUES IN (${number}) SERVER ${server} OPTIONS (schema_name ${schema}, table_name 'enrollments');
CREATE FOREIGN TABLE sequencer.${reevaluations} PARTITION OF sequencer.reevaluations
    FOR VALUES IN (${number}) SERVER ${server} OPTIONS (schema_name ${schema}, table_name 'reevaluations');
