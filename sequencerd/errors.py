"""What can go wrong, as a tree:

    SequencerdError            the message is for the user, whole
    ├── SettingsError          a setting is unknown or wrong
    ├── DatabaseError          the database cannot be used: unreachable, refused, too old
    │   └── MigrationError     the schema is missing, older, newer or changed
    ├── FileError              a file of definitions is wrong
    ├── PlanError              a plan cannot be applied, or is out of date
    ├── ShardsError            errors of several shards, a line for each
    └── UsageError             wrong use of a command
        └── ArgumentError      by its arguments alone

`DefinitionError` and `EvaluationError` belong to the core: core/faults.py.
"""

from __future__ import annotations


class SequencerdError(Exception):
    """An error that the user can fix; the command line prints its message and exits with 1."""

    exit_code = 1


class SettingsError(SequencerdError):
    """A setting is unknown or wrong."""

    exit_code = 2


class DatabaseError(SequencerdError):
    """The database cannot be used."""


class MigrationError(DatabaseError):
    """The schema is missing, older, newer or changed."""


class FileError(SequencerdError):
    """A file of definitions is wrong."""


class PlanError(SequencerdError):
    """A plan cannot be applied, or is out of date."""


class ShardsError(SequencerdError):
    """The errors that keep several shards from doing the same: a line for each."""


class UsageError(SequencerdError):
    """Wrong use of a command."""


class ArgumentError(UsageError):
    """The arguments of a command are wrong, whatever the database and files contain."""

    exit_code = 2
