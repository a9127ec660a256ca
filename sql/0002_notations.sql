-- Functions that find addresses in every notation, whatever the locale of the database and the setting
-- standard_conforming_strings of the session: patterns with backslashes are written as E''; and corrections of
-- other functions. No table is locked, and each statement can be executed again, as after going back to 1.0.0.

-- suppressions ----------------------------------------------------------------------------------

-- runners/sms/numbers.py and email/mime.py normalise a recipient in the same way: a number without blanks,
-- dashes, invisible characters, and the zero of national calls as in +49 (0)151; an e-mail address without
-- the invisible characters that are copied from web pages. Letters in ASCII are folded first, because a
-- language may have another lower case for I than i, such as Turkish.
CREATE OR REPLACE FUNCTION sequencer.stored_address(channel text, address text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    blanks CONSTANT text := E'[\\s\\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+';
    invisible CONSTANT text := E'[\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u206f'
        '\\ufeff]+|^[\\u200c\\u200d]+|[\\u200c\\u200d]+$';
    separators CONSTANT text := E'[\\s\\u00a0\\u00ad\\u058a\\u05be\\u061c\\u1680\\u1806\\u180e\\u2000-\\u2015'
        '\\u2028-\\u202f\\u2043\\u2044\\u205f-\\u206f\\u2212\\u2215\\u2e17\\u2e1a\\u2e3a\\u2e3b\\u3000\\u301c'
        '\\u3030\\u30a0\\u30fc\\ufe31\\ufe32\\ufe58\\ufe63\\ufeff\\uff0d().\\/-]';
    -- of Arabic, Persian, Hindi, Bengali, Burmese and Japanese
    digits CONSTANT text := E'\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0669'
        '\u06f0\u06f1\u06f2\u06f3\u06f4\u06f5\u06f6\u06f7\u06f8\u06f9'
        '\u0966\u0967\u0968\u0969\u096a\u096b\u096c\u096d\u096e\u096f'
        '\u09e6\u09e7\u09e8\u09e9\u09ea\u09eb\u09ec\u09ed\u09ee\u09ef'
        '\u1040\u1041\u1042\u1043\u1044\u1045\u1046\u1047\u1048\u1049'
        '\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19';
    plain text COLLATE "C" := btrim(address COLLATE "C", E' \t\r\n\u00a0\u3000');
    number text COLLATE "C";
    prefix text COLLATE "C";
BEGIN
    IF channel = 'email' THEN
        plain := lower(lower(plain) COLLATE "default");
        plain := regexp_replace(regexp_replace(plain, invisible, '', 'g'),
                                '^' || blanks || '|' || blanks || '$', '', 'g');
        RETURN coalesce(btrim(substring(plain FROM '<([^<>@]+@[^<>@]+)>$')), plain); -- Ada <a@x.org>
    ELSIF channel <> 'sms' THEN
        RETURN plain;
    END IF;
    plain := lower(plain);
    number := translate(plain, digits || '＋（）．／', repeat('0123456789', 6) || '+()./');
    number := regexp_replace(number, '^' || separators || '+', '');
    prefix := coalesce(substring(number FROM '^[a-z][a-z0-9.+-]*:'), '');
    number := regexp_replace(substr(number, length(prefix) + 1), '^' || separators || '+', '');
    IF number !~ ('^([+0-9]|' || separators || ')+$') THEN
        RETURN plain;
    END IF;
    number := regexp_replace(number, E'^(\\+(?!(?:39|378|379|225|241|242)' || separators
        || ')[1-9][0-9]{0,2})' || separators || E'*\\(\\s*0\\s*\\)', E'\\1');
    RETURN CASE WHEN prefix = 'tel:' THEN '' ELSE prefix END || regexp_replace(number, separators, '', 'g');
END $$;

COMMENT ON FUNCTION sequencer.stored_address IS 'Return an address as suppressions store it.';

-- SECURITY DEFINER, because only the owner may execute stored_address.
CREATE OR REPLACE FUNCTION sequencer.normalise_suppression() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.topic := coalesce(NEW.topic, '*');
    NEW.source := coalesce(NEW.source, 'application');
    NEW.created_at := coalesce(NEW.created_at, now());
    NEW.channel := lower(btrim(NEW.channel) COLLATE "C");
    NEW.address := sequencer.stored_address(NEW.channel, NEW.address);
    RETURN NEW;
END $$;


-- privacy ---------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION sequencer.punycode(label text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    codes CONSTANT integer[] := ARRAY(
        SELECT ascii(letter) FROM unnest(string_to_array(label, NULL)) WITH ORDINALITY AS l (letter, number)
         ORDER BY number);
    written text := regexp_replace(label, '[^[:ascii:]]', '', 'g');
    basic CONSTANT integer := length(written);
    done integer := basic;
    least_code integer := 128;
    next_code integer;
    code integer;
    delta bigint := 0;
    bias integer := 72;
    rest bigint;
    place integer;
    threshold integer;
BEGIN
    IF basic > 0 THEN
        written := written || '-';
    END IF;
    WHILE done < cardinality(codes) LOOP
        next_code := (SELECT min(c) FROM unnest(codes) AS c WHERE c >= least_code);
        delta := delta + (next_code - least_code)::bigint * (done + 1);
        least_code := next_code;
        FOREACH code IN ARRAY codes LOOP
            IF code < least_code THEN
                delta := delta + 1;
            ELSIF code = least_code THEN
                rest := delta;
                place := 36;
                LOOP
                    threshold := least(greatest(place - bias, 1), 26);
                    EXIT WHEN rest < threshold;
                    written := written || substr('abcdefghijklmnopqrstuvwxyz0123456789',
                        (threshold + (rest - threshold) % (36 - threshold))::integer + 1, 1);
                    rest := (rest - threshold) / (36 - threshold);
                    place := place + 36;
                END LOOP;
                written := written || substr('abcdefghijklmnopqrstuvwxyz0123456789', rest::integer + 1, 1);
                delta := delta / CASE WHEN done = basic THEN 700 ELSE 2 END;
                delta := delta + delta / (done + 1);
                bias := 0;
                WHILE delta > 455 LOOP
                    delta := delta / 35;
                    bias := bias + 36;
                END LOOP;
                bias := bias + 36 * delta / (delta + 38);
                delta := 0;
                done := done + 1;
            END IF;
        END LOOP;
        delta := delta + 1;
        least_code := least_code + 1;
    END LOOP;
    RETURN written;
END $$;

COMMENT ON FUNCTION sequencer.punycode IS 'Return a label of an international domain in ASCII, without xn-- (RFC 3492).';

CREATE OR REPLACE FUNCTION sequencer.plain_email(address text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN local ~ '^".*"$' THEN regexp_replace(substr(local, 2, length(local) - 2), E'\\\\(.)', E'\\1', 'g')
                ELSE local END || '@' || (
           SELECT string_agg(CASE WHEN label ~ '[^[:ascii:]]' AND length(label) <= 63
                                  THEN 'xn--' || sequencer.punycode(label) ELSE label END, '.' ORDER BY number)
             FROM regexp_split_to_table(normalize(domain, NFKC), '[.。]') WITH ORDINALITY AS l (label, number))
      FROM (SELECT sequencer.stored_address('email', plain_email.address) AS stored) AS s
     CROSS JOIN LATERAL (SELECT substring(stored FROM '^(.+)@[^@]+$') AS local,
                                substring(stored FROM '@([^@]+)$') AS domain) AS parts
$$;

COMMENT ON FUNCTION sequencer.plain_email IS 'Return an e-mail address in the form that all its notations have in common: in lower case, without quotation marks, its domain in ASCII; NULL for another text.';

-- An address in the data is the subject's, wherever it is. In messages it may belong to others, such as the
-- sender's, so those only serve to find suppressions.
CREATE OR REPLACE FUNCTION sequencer.terms_of(subject text) RETURNS TABLE (kind text, term text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH texts (value, is_own) AS MATERIALIZED (
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
    ), emails (value, is_own) AS (
        SELECT DISTINCT rtrim(m.found[1], '.'), is_own
          FROM texts, regexp_matches(value, '[^[:space:]<>,;:"''()]+@[^[:space:]<>,;:"''()]+', 'g') AS m (found)
         WHERE octet_length(m.found[1]) <= 320
        UNION -- with quotation marks
        SELECT value, true FROM texts
         WHERE is_own AND value LIKE '%"@%' AND octet_length(value) <= 1000
    ), numbers (number) AS (
        SELECT substring(sequencer.stored_address('sms', value) FROM E'^(?:[a-z][a-z0-9.+-]*:)?(\\+?[0-9]{5,17})$')
          FROM texts WHERE is_own AND length(value) <= 60
           AND value ~ (E'^[^a-zA-Z]*([a-zA-Z][a-zA-Z0-9.+-]*:)?([^a-zA-Z]*'
               '[0-9\u0660-\u0669\u06f0-\u06f9\u0966-\u096f\u09e6-\u09ef\u1040-\u1049\uff10-\uff19]){2}[^a-zA-Z]*$')
    )
    SELECT CASE WHEN is_own THEN 'email' ELSE 'message' END, form
      FROM emails, unnest(ARRAY[lower(value COLLATE "C"), sequencer.plain_email(value)]) AS form
     WHERE form IS NOT NULL
    UNION
    SELECT 'phone', regexp_replace(number, E'^(\\+|00)', '') FROM numbers WHERE number ~ E'^(\\+|00)'
    UNION
    SELECT 'digits', number FROM numbers WHERE number ~ '^[0-9]{7}'
    UNION
    SELECT 'value', lower(btrim(value) COLLATE "C") FROM texts
     WHERE is_own AND octet_length(value) BETWEEN 1 AND 1000
    UNION -- as addresses of custom runners are kept
    SELECT 'verbatim', btrim(value, E' \t\r\n\u00a0\u3000') FROM texts
     WHERE is_own AND octet_length(value) BETWEEN 1 AND 1000
$$;

CREATE OR REPLACE FUNCTION sequencer.addresses_of(subject text) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH terms AS MATERIALIZED (SELECT * FROM sequencer.terms_of(addresses_of.subject)), forms (form) AS (
        SELECT term FROM terms WHERE kind IN ('email', 'message', 'value', 'verbatim')
        UNION SELECT channel || prefix || term
                FROM terms, unnest(ARRAY['', 'whatsapp:', 'rcs:']) AS channel, unnest(ARRAY['', '+', '00']) AS prefix
               WHERE kind IN ('phone', 'digits')
    )
    SELECT form FROM forms UNION ALL SELECT sequencer.suppression_hash(form) FROM forms
$$;

-- Few addresses are not in ASCII, or in quotation marks; those are compared in the form that all notations
-- have in common.
CREATE OR REPLACE FUNCTION sequencer.suppressions_of(subject text) RETURNS SETOF sequencer.suppressions
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH addresses (address) AS MATERIALIZED (SELECT sequencer.addresses_of(suppressions_of.subject))
    SELECT s.* FROM sequencer.suppressions AS s
     WHERE s.address IN (SELECT address FROM addresses)
        OR s.address ~ '[^[:ascii:]]|"@'
           AND sequencer.plain_email(s.address) IN (SELECT address FROM addresses)
$$;

-- Matches only whole words; a short subject, such as 7, only where messages of sequencerd quote it. Words
-- share what must not be beside them: with that in each, a thousand take minutes to compile.
CREATE OR REPLACE FUNCTION sequencer.mentions_of(subject text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH terms AS MATERIALIZED (
        SELECT * FROM sequencer.terms_of(mentions_of.subject)
    ), words AS MATERIALIZED (
        SELECT regexp_replace(t.text, E'([][!-/:-@^_`{-~\\\\])', E'\\\\\\1', 'g') AS word
          FROM (SELECT mentions_of.subject AS text
                UNION SELECT term FROM terms WHERE kind = 'email') AS t
    )
    SELECT concat_ws('|',
        (SELECT string_agg(format(E'(?<='')%1$s(?='')|(?<=\\mfrom )%1$s(?= to )|(?<= to )%1$s(?= by )', word), '|')
           FROM words WHERE length(word) < 5),
        (SELECT format(E'(?<![[:alnum:]_.@+-])(?:%s)(?![[:alnum:]_@-]|\\.[[:alnum:]])', string_agg(word, '|'))
           FROM words WHERE length(word) >= 5 HAVING count(*) > 0),
        (SELECT format('(?<![0-9])(?:00)?(?:%s)(?![0-9])', string_agg(
                array_to_string(regexp_split_to_array(term, ''), E'(?:[ ()./-]|\\(0\\))*'), '|'))
           FROM terms WHERE kind = 'phone' HAVING count(*) > 0))
$$;

-- LIKE takes a tenth of the time of the regular expression, which is compared only with texts that have an
-- outline. lower(... COLLATE "C") folds the case of ASCII letters alone, so of a word the longest part in
-- ASCII is searched; of a number the digits, whatever is between them.
CREATE OR REPLACE FUNCTION sequencer.outlines_of(subject text) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH terms AS MATERIALIZED (SELECT * FROM sequencer.terms_of(outlines_of.subject))
    SELECT array_agg(DISTINCT outline) FROM (
        SELECT '%' || regexp_replace(lower(longest.part COLLATE "C"), E'([%_\\\\])', E'\\\\\\1', 'g') || '%'
          FROM (SELECT outlines_of.subject AS text
                UNION SELECT term FROM terms WHERE kind = 'email') AS t
         CROSS JOIN LATERAL (
               SELECT part FROM regexp_split_to_table(t.text, '[^[:ascii:]]+') AS part
                ORDER BY length(part) DESC LIMIT 1) AS longest
        UNION ALL
        SELECT '%' || array_to_string(regexp_split_to_array(term, ''), '%') || '%'
          FROM terms WHERE kind = 'phone') AS outlines (outline)
$$;


-- schedules -------------------------------------------------------------------------------------

-- A definition that cannot be read does not hide the others.
CREATE OR REPLACE VIEW sequencer.schedules AS
SELECT q.name AS sequence, q.status, q.enroll->>'from' AS source,
       coalesce(q.enroll->>'schedule', concat_ws(' ', 'every', q.enroll->'every'->>'amount',
                                                 q.enroll->'every'->>'unit')) AS schedule,
       CASE WHEN q.enroll->>'at_most' IS NULL THEN 1000
            WHEN q.enroll->>'at_most' ~ '^[0-9]{1,9}$' THEN (q.enroll->>'at_most')::integer END AS at_most,
       r.next_run_at, r.last_run_at, r.duration, r.found, r.enrolled, r.problem
  FROM sequencer.sequences AS q LEFT JOIN sequencer.scheduled_runs AS r ON r.sequence = q.name
 WHERE q.enroll IS NOT NULL ORDER BY q.name;


-- enrollments -----------------------------------------------------------------------------------

-- A user can set sequencer.renaming by hand: it counts only in what the trigger follow_rename executes.
CREATE OR REPLACE FUNCTION sequencer.normalise_move() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('sequencer.renaming', true) = 'on' AND pg_trigger_depth() > 1 THEN
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


-- It is repeated only if that can help: not if the snapshot of the transaction hides what is in the way, nor
-- if an index of a user forbids it.
CREATE OR REPLACE FUNCTION sequencer.merge(from_subject text, into_subject text) RETURNS bigint
LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    lock_timeout CONSTANT text := current_setting('lock_timeout');
    give_up_at CONSTANT timestamptz := clock_timestamp() + interval '1 minute';
    reason CONSTANT text := nullif(current_setting('sequencer.reason', true), '');
    others CONSTANT text[] := ARRAY['items', 'collecting'];
    pair record;
    violated text;
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
            IF SQLSTATE = '23505' THEN
                GET STACKED DIAGNOSTICS violated = CONSTRAINT_NAME; -- Citus returns none, or adds a number
                IF violated <> '' AND NOT starts_with(violated, 'one_entry') THEN
                    RAISE; -- the index of a user
                ELSIF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
                    RAISE serialization_failure USING
                        MESSAGE = format('subject %L cannot be merged into %L: it was enrolled after this '
                                         'transaction began to read', from_subject, into_subject),
                        SCHEMA = 'sequencer', TABLE = 'enrollments', CONSTRAINT = 'one_entry',
                        HINT = 'Repeat the transaction.';
                END IF;
            END IF;
            -- one is locked, or is being enrolled: nothing is locked while waiting for it, so that no deadlock
            -- fails the other session. (Only the index can tell that one is being enrolled: it waits for 1 ms.)
            IF clock_timestamp() > give_up_at THEN
                RAISE;
            END IF;
        END;
        PERFORM pg_sleep(0.005 + random() * 0.02);
    END LOOP;
END $$;


-- `wake_at IS NOT NULL` means active, like `status = 'active'`. But with the latter, the planner may read the
-- index of all active enrollments instead of that of subjects, where it has no statistics or old ones.
CREATE OR REPLACE FUNCTION sequencer.reevaluate(
    subject text DEFAULT NULL, sequence text DEFAULT NULL, step text DEFAULT NULL,
    ids bigint[] DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    count bigint;
BEGIN
    WITH woken AS (
        UPDATE sequencer.enrollments AS e SET wake_at = least(e.wake_at, now())
         WHERE e.leased_by IS NULL
           AND (e.status = 'active' OR num_nonnulls(reevaluate.subject, reevaluate.ids) > 0 AND e.wake_at IS NOT NULL)
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


-- With the caller's rights, as an INSERT and an UPDATE would be.
CREATE OR REPLACE FUNCTION sequencer.collect(
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
         WHERE e.subject = collect.subject AND e.sequence = collect.sequence AND e.wake_at IS NOT NULL
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


-- changes of steps ------------------------------------------------------------------------------

-- A goal whose new condition is that of another goal in the same statement, as when two goals swap their
-- conditions, also affects all enrollments in the sequence.
CREATE OR REPLACE FUNCTION sequencer.touch_sequences() RETURNS trigger
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
            EXCEPT ALL SELECT sequence, config FROM old_steps WHERE type = 'Goal'
            UNION ALL
            SELECT n.sequence, n.config FROM new_steps AS n JOIN old_steps AS o USING (sequence, name)
             WHERE n.type = 'Goal' AND o.type = 'Goal' AND n.config <> o.config) AS other;
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


-- limits ----------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION sequencer.reserve(
    numbers integer[], keys bytea[], topics text[], enrollments bigint[], visits integer[],
    at_most integer[], periods interval[], at timestamptz
) RETURNS TABLE (entry bigint, free_at timestamptz)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    turn record;
BEGIN
    -- what was reserved while the server's clock was ahead counts from now on: until its own time, it
    -- would hold up all others
    INSERT INTO sequencer.reservations AS r (key, topic, longest, counts_until)
    SELECT w.key, min(w.topic), max(w.period), reserve.at + max(w.period)
      FROM unnest(keys, topics, periods) AS w (key, topic, period) GROUP BY w.key ORDER BY w.key
    ON CONFLICT ON CONSTRAINT reservations_pkey
    DO UPDATE SET longest = greatest(r.longest, excluded.longest),
                  counts_until = least(greatest(r.counts_until, excluded.counts_until), reserve.at
                      + greatest(r.longest, excluded.longest) + interval '1 minute'),
                  at = CASE WHEN reserve.at + interval '1 minute' < ANY (r.at)
                            THEN ARRAY(SELECT least(o.at, reserve.at)
                                         FROM unnest(r.at) WITH ORDINALITY AS o (at, number)
                                        ORDER BY o.number)
                            ELSE r.at END;
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


REVOKE ALL ON ALL FUNCTIONS IN SCHEMA sequencer FROM PUBLIC;
