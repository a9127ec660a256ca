-- Statements of migrate.

-- name: lock_migrations
-- Acquire the migration lock until the end of the transaction: processes migrate one at a time.
SELECT pg_advisory_xact_lock({migrations_lock});

-- name: grant_to_create
-- Read what an administrator has to run if the schema does not exist and the user cannot create it.
SELECT format('GRANT CREATE ON DATABASE %I TO %I', current_database(), current_user)
 WHERE to_regnamespace('sequencer') IS NULL
   AND NOT has_database_privilege(current_database(), 'CREATE');

-- name: citus_cannot_name
-- Check whether Citus would distribute the schema, and cannot: in GRANT and REVOKE on functions, it does
-- not quote the name for its nodes.
SELECT coalesce(current_setting('citus.enable_schema_based_sharding', true)::boolean, false)
   AND quote_ident('sequencer') <> 'sequencer';

-- name: migration_settings
-- Turn off settings of a login or a database for this transaction: time limits, because a large table may take long, and PL/pgSQL's optional errors.
SELECT set_config(name, '0', true) FROM pg_settings
 WHERE name IN ('statement_timeout', 'lock_timeout', 'transaction_timeout')
UNION ALL
SELECT set_config('plpgsql.extra_errors', 'none', true);

-- name: limit_locks
-- Wait for a lock for 5 seconds at most: all other users of the table wait behind it.
SET LOCAL lock_timeout = '5s';

-- name: other_owner
-- Read the owner of the tables, if that is not the user.
SELECT rolname::text FROM pg_class JOIN pg_roles AS r ON r.oid = relowner
 WHERE pg_class.oid = to_regclass('sequencer.migrations') AND rolname <> current_user;

-- name: act_as
-- Act as another role until the end of the transaction.
SELECT set_config('role', $1, true);

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
