"""Sequences and enrollments from the tables of the original Sequencer.

Its tables are `sequences`, `steps`, and `runners`, its word for enrollments. `read` makes the
definitions (`translate` what differs), `enrollments` writes the enrollments, `report` says what was
done.
"""
