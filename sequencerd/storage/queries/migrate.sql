-- Statements that migrate.

-- name: lock_migrations
-- Acquire the migration lock until the end of the transaction: processes migrate one at a time.
SELECT pg_advisory_xact_lock({migrations_lock});

-- name: create_migrations
-- Create the schema and the table of applied migrations. IF NOT EXISTS would ask for the right to create
-- them even if an administrator has done so.
DO $$ BEGIN
    IF to_regnamespace('sequencer') IS NULL THEN
        CREATE SCHEMA sequencer;
    END IF;
    IF to_regclass('sequencer.migrations') IS NULL THEN
        CREATE TABLE sequencer.migrations (
            version    integer PRIMARY KEY,
            name       text NOT NULL,
            checksum   text NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now()
        );
    END IF;
END $$;

-- name: has_migrations
-- Check whether the table of applied migrations exists.
SELECT to_regclass('sequencer.migrations') IS NOT NULL;

-- name: migrations
-- Read the applied migrations.
SELECT version, name, checksum FROM sequencer.migrations ORDER BY version;

-- name: record_migration
-- Record an applied migration.
INSERT INTO sequencer.migrations (version, name, checksum) VALUES ($1, $2, $3);

-- name: has_shard_number
-- Check whether the table of the number of the shard exists.
SELECT to_regclass('sequencer.shard') IS NOT NULL;

-- name: shard_number
-- Read which of several shards the schema is.
SELECT number, shards FROM sequencer.shard;

-- name: number_shard
-- Record which of several shards the schema is.
INSERT INTO sequencer.shard (number, shards) VALUES ($1, $2);

-- name: missing_grants
-- Read the statements that grant what the roles lack.
SELECT statement FROM sequencer.missing_grants;

-- name: server_version
-- Read the server's version as a number.
SELECT current_setting('server_version_num')::integer;

-- name: server_encoding
-- Read the encoding of the database.
SELECT current_setting('server_encoding');
