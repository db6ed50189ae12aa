-- After pg_restore and before the start: psql "$DATABASE_URL" -f deploy/after_pg_restore.sql
-- Ends every session and API token, because those that were ended since the backup would live again,
-- and lets numbers go on where none was handed out, in this or another past: no instance hands out
-- one a millisecond, and that is how many have passed since 1970. Clients get 410 resync_required.
\set ON_ERROR_STOP on
SELECT (extract(epoch FROM now()) * 1000)::bigint AS start \gset
BEGIN;
DELETE FROM refresh_tokens;
DELETE FROM sessions;
UPDATE users SET seq = :start, purged_seq = :start;
SELECT setval(pg_get_serial_sequence(name, 'id'), :start)
FROM unnest(ARRAY['users', 'sessions', 'refresh_tokens', 'tasks', 'attachments']) AS name;
COMMIT;
