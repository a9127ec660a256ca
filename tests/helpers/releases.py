"""What releases have promised of the schema, and a migration as the next release may have one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sequencerd.storage.migrations import Migration, available

REPOSITORY = Path(__file__).parent.parent.parent
RECORDS_FILE = REPOSITORY / "tests/sql/released.txt"


class Record(NamedTuple):
    """A file of sql/, and the release that had it first."""

    release: str
    name: str
    checksum: str


def read_records() -> list[Record]:
    """Read what was recorded, the oldest first."""
    lines = RECORDS_FILE.read_text("utf-8").splitlines()
    return [Record(*line.split()) for line in lines if not line.startswith("#")]


def wrong_files(records: Iterable[Record], migrations: Iterable[Migration]) -> Iterator[str]:
    """Yield what is not as it was released: such files are never changed, only added to."""
    found = {migration.name: migration for migration in migrations}
    known = {record.name: record for record in records}
    for name, record in known.items():
        if name not in found:
            yield f"sql/{name} of {record.release} is gone: restore it"
        elif found[name].checksum != record.checksum:
            yield f"sql/{name} of {record.release} was changed: restore it, and add a new file"
    last = max(known, default="")
    for name in sorted(found.keys() - known.keys()):
        if name < last:
            yield f"sql/{name} is numbered below {last}, which is released"


def newest_release(changelog: str) -> str | None:
    """The version of the first heading; None while that is for what is not released."""
    heading = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert heading
    return None if heading[1] == "Unreleased" else heading[1]


def previous_release(changelog: str) -> str | None:
    """The version before that of the first heading, which is the one in work; None if there is
    none.
    """
    headings = re.findall(r"^## (\S+)", changelog, re.MULTILINE)
    return headings[1] if len(headings) > 1 else None


def unrecorded(
    release: str | None, records: Iterable[Record], migrations: Iterable[Migration]
) -> list[Record]:
    """What a release has to record."""
    known = {record.name for record in records}
    return [
        Record(release, migration.name, migration.checksum)
        for migration in migrations
        if release is not None and migration.name not in known
    ]


def commit_of(release: str) -> str | None:
    """Return the commit that gave a release its heading, as a clone may have no tags; None if that
    is not in the history.
    """
    found = subprocess.run(
        ["git", "log", "-1", "--format=%H", f"-S## {release} (", "--", "CHANGELOG.md"],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or None


def copy_release(commit: str, folder: Path) -> Path:
    """Write the package as it was in a commit into a folder."""
    archive = subprocess.run(
        ["git", "archive", commit, "sequencerd", "sql"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "--extract", "--directory", folder], input=archive.stdout, check=True)
    return folder


def next_migration() -> Migration:
    """One that changes of each kind of object what a later version may change."""
    version = available()[-1].version + 1
    return Migration(
        version,
        f"{version:04}_next.sql",
        """\
ALTER TABLE sequencer.enrollments ADD COLUMN next text CHECK (next <> '');
CREATE INDEX enrollments_next ON sequencer.enrollments (next) WHERE next IS NOT NULL;
ALTER TABLE sequencer.steps ADD COLUMN next text NOT NULL DEFAULT 'none';
ALTER TABLE sequencer.events ADD COLUMN next text;
CREATE TABLE sequencer.next (id bigint PRIMARY KEY, subject text COLLATE "C");
CREATE FUNCTION sequencer.next() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.next := coalesce(NEW.next, NEW.subject);
    RETURN NEW;
END $$;
CREATE TRIGGER next BEFORE INSERT ON sequencer.enrollments
    FOR EACH ROW EXECUTE FUNCTION sequencer.next();
CREATE OR REPLACE VIEW sequencer.failures AS
SELECT id, sequence, step, subject, failure, last_error, ended_at AS failed_at, next
  FROM sequencer.enrollments WHERE status = 'failed' ORDER BY ended_at DESC;
COMMENT ON COLUMN sequencer.enrollments.next IS 'What is next.';
UPDATE sequencer.enrollments SET next = subject;
""",
    )
