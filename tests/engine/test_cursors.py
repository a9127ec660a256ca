"""Cursors against a model of a step's rows: nothing that is due is passed over, in any order of
what writers, other sessions and claims do, and without a sweep.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.enrollment import NEVER
from sequencerd.engine.cursors import EARLIEST_WAKE, KEPT_FOR, OVERLAP, Claim, Cursors
from sequencerd.storage.wakes import LeftAtStep

START = datetime(2026, 1, 1, tzinfo=UTC)
HERE = ("s", "a")
LIMIT = 2
SECOND = timedelta(seconds=1)


class AbortError(Exception):
    """The transaction of a claim fails."""


@dataclass
class Writer:
    """A transaction of an application: what it writes is visible once it commits."""

    began: datetime
    wakes: list[datetime] = field(default_factory=list)


@dataclass
class Claiming:
    """A claim in progress, with the rows that it has locked."""

    manager: AbstractContextManager[Claim]
    claim: Claim
    now: datetime
    rows: list[int] = field(default_factory=list)
    has_read: bool = False


class Model:
    """The rows at a step, and what happens to them. Times pass only by `tick`."""

    def __init__(self) -> None:
        self.now = START
        self.cursors = Cursors()
        self.wakes: dict[int, datetime] = {}  # what is committed
        self.locked: set[int] = set()
        self.by_others: set[int] = set()
        self.writers: list[Writer] = []
        self.claims: list[Claiming] = []
        self.messages: list[tuple[datetime | None, bool]] = []
        self.count = 0

    @property
    def daemon_now(self) -> datetime:
        """By the daemon's clock, which is never ahead of the database's."""
        return self.now - timedelta(seconds=0.05)

    def tick(self, size: int) -> None:
        self.now += timedelta(seconds=size / 8)

    def begin(self, _: int) -> None:
        self.writers.append(Writer(self.now))

    def insert(self, size: int) -> None:
        if self.writers:
            writer = self.writers[size % len(self.writers)]
            offset = (0, 0, 0, -20, 30)[size % 5]
            writer.wakes.append(writer.began + timedelta(seconds=offset))

    def commit(self, size: int) -> None:
        if self.writers:
            writer = self.writers.pop(size % len(self.writers))
            for wake_at in writer.wakes:
                self.add(wake_at)
            if writer.wakes:  # as the trigger notify_due
                since = writer.began if min(writer.wakes) >= writer.began else None
                self.messages.append((since, max(writer.wakes) > writer.began))

    def write(self, size: int) -> None:
        """Insert a row, in a transaction that takes no time."""
        self.writers.insert(0, Writer(self.now))
        self.writers[0].wakes.append(self.now - timedelta(seconds=size % 3))
        self.commit(0)
        self.deliver(0)

    def add(self, wake_at: datetime) -> None:
        self.count += 1
        self.wakes[self.count] = wake_at

    def deliver(self, _: int) -> None:
        if self.messages:
            since, is_later = self.messages.pop(0)
            self.cursors.report(HERE, since, self.daemon_now, is_later=is_later)

    def forget(self, _: int) -> None:
        self.cursors.forget_unused(self.now + KEPT_FOR)

    def lock(self, size: int) -> None:
        if free := sorted(self.wakes.keys() - self.locked):
            self.by_others.add(free[size % len(free)])
            self.locked |= self.by_others

    def unlock(self, _: int) -> None:
        self.locked -= self.by_others
        self.by_others.clear()

    def claim(self, _: int) -> None:
        if len(self.claims) < 2:
            now = self.daemon_now
            manager = self.cursors.claim(HERE, frozenset(), now)
            self.claims.append(Claiming(manager, manager.__enter__(), now))

    def read(self, size: int) -> None:
        if waiting := [one for one in self.claims if not one.has_read]:
            one = waiting[size % len(waiting)]
            one.has_read = True
            due = sorted(
                (wake_at, id_)
                for id_, wake_at in self.wakes.items()
                if one.claim.start <= wake_at <= one.now and id_ not in self.locked
            )
            one.rows = [id_ for _, id_ in due[:LIMIT]]
            self.locked.update(one.rows)
            if one.rows:
                one.claim.reached = self.wakes[one.rows[-1]]

    def peek(self, size: int) -> None:
        """Read without a lock and check what is left at the same time, if all can be claimed."""
        if waiting := [one for one in self.claims if not one.has_read]:
            one = waiting[size % len(waiting)]
            due = {id_: at for id_, at in self.wakes.items() if one.claim.since <= at <= one.now}
            if len(due) < LIMIT and not self.locked & due.keys():
                one.has_read, one.rows = True, list(due)
                self.locked.update(due)
                one.claim.reached = max(due.values(), default=None)
                ahead = min((at for at in self.wakes.values() if at > one.now), default=NEVER)
                looks = one.claim.ahead is None
                one.claim.left = LeftAtStep(self.now, None, None, ahead if looks else None)

    def check(self, size: int) -> None:
        if reading := [one for one in self.claims if one.has_read and one.claim.left is None]:
            one = reading[size % len(reading)]
            is_last = len(one.rows) < LIMIT
            if is_last or one.claim.is_to_check:
                others = {id_: at for id_, at in self.wakes.items() if id_ not in one.rows}
                due = min(
                    (at for at in others.values() if one.claim.since <= at <= one.now), default=None
                )
                ahead = min((at for at in others.values() if at > one.now), default=NEVER)
                looks = is_last and one.claim.ahead is None
                one.claim.left = LeftAtStep(self.now, due, due, ahead if looks else None)

    def end(self, size: int) -> None:
        """Commit a claim, or roll it back. Some rows stay here, as there is no slot for them."""
        self.read(size)
        self.check(size)
        if done := [one for one in self.claims if one.has_read and not self.has_to_check(one)]:
            one = done[size % len(done)]
            self.claims.remove(one)
            self.locked.difference_update(one.rows)
            if size % 4 == 3:
                with suppress(AbortError):
                    one.manager.__exit__(AbortError, AbortError(), None)
                return
            for id_ in one.rows:
                kept_at = min(self.wakes.pop(id_), one.now)
                if size % 4 == 1:
                    self.add(kept_at)
                    is_later = size % 8 == 1  # of the same batch, and reported with it
                    if is_later:
                        self.add(kept_at + timedelta(seconds=2))
                    self.cursors.report(HERE, kept_at, self.daemon_now, is_later=is_later)
                    break
            one.manager.__exit__(None, None, None)

    @staticmethod
    def has_to_check(one: Claiming) -> bool:
        return one.claim.left is None and (len(one.rows) < LIMIT or one.claim.is_to_check)

    def settle(self) -> None:
        """Let everything end that is in progress, and claim until nothing says to claim again."""
        while self.claims or self.writers or self.messages:
            self.end(2)
            self.commit(0)
            self.deliver(0)
        self.unlock(0)
        again = True
        while again:
            self.claim(0)
            one = self.claims[0]
            self.read(0)
            self.check(0)
            left = one.claim.left
            again = len(one.rows) == LIMIT or left is None or left.again_at is not None
            self.end(2)
            if not again:
                assert left is not None
                ahead = one.claim.ahead or left.ahead
                assert ahead is not None
                assert ahead <= min(self.wakes.values(), default=NEVER)
        assert [at for at in self.wakes.values() if at <= self.daemon_now] == []


ACTIONS = st.sampled_from(
    [
        "tick",
        "begin",
        "insert",
        "commit",
        "deliver",
        "lock",
        "unlock",
        "read",
        "peek",
        "check",
        "forget",
    ]
    + ["write", "claim", "end"] * 2
)


@given(st.lists(st.tuples(ACTIONS, st.integers(0, 60)), max_size=120))
def test_nothing_that_is_due_is_passed_over(steps: list[tuple[str, int]]) -> None:
    model = Model()
    for name, size in steps:
        getattr(model, name)(size)
    model.settle()


def claimed(cursors: Cursors, now: datetime, excluded: frozenset[int] = frozenset()) -> Claim:
    """A claim that finds nothing, with nothing left."""
    with cursors.claim(HERE, excluded, now) as claim:
        claim.left = LeftAtStep(now, None, None, NEVER)
    return claim


def test_a_claim_begins_shortly_before_the_last_check() -> None:
    cursors = Cursors()
    assert claimed(cursors, START).start == EARLIEST_WAKE
    assert claimed(cursors, START + SECOND).start == START - OVERLAP
    assert cursors.known == {HERE: START + SECOND - OVERLAP}


@pytest.mark.parametrize("behind", [SECOND, -SECOND])
def test_a_claim_begins_by_the_slower_clock(behind: timedelta) -> None:
    cursors = Cursors()
    with cursors.claim(HERE, frozenset(), START) as claim:
        claim.left = LeftAtStep(START - behind, None, None, NEVER)
    slower = min(START, START - behind)
    assert claimed(cursors, START + SECOND).start == slower - OVERLAP


def test_readmitted_enrollments_are_searched_from_the_beginning() -> None:
    cursors = Cursors()
    claimed(cursors, START, frozenset({1, 2}))
    assert claimed(cursors, START, frozenset({1, 2, 3})).start == START - OVERLAP
    assert claimed(cursors, START, frozenset({3})).start == EARLIEST_WAKE


def test_a_claim_that_fails_is_repeated_from_where_it_began() -> None:
    cursors = Cursors()
    claimed(cursors, START)
    with suppress(AbortError), cursors.claim(HERE, frozenset(), START + SECOND):
        with cursors.claim(HERE, frozenset(), START + SECOND) as other:  # skips what is locked
            other.reached = START + SECOND
        raise AbortError
    assert claimed(cursors, START + SECOND).start == START - OVERLAP


def test_after_the_clock_was_set_back_claims_begin_at_the_start() -> None:
    cursors = Cursors()
    claimed(cursors, START)
    with cursors.claim(HERE, frozenset(), START + SECOND) as claim:
        cursors.forget()
        claim.left = LeftAtStep(START + SECOND, None, None, NEVER)
    first = claimed(cursors, START - 3600 * SECOND)
    assert first.start == EARLIEST_WAKE
    assert first.is_to_check


def test_a_claim_knows_what_the_last_one_has_found() -> None:
    cursors = Cursors()
    for found, empty_claims in ((0, 1), (0, 2), (7, 0), (1, 0), (0, 1)):
        before = cursors.empty_claims(HERE)
        with cursors.claim(HERE, frozenset(), START) as claim:
            assert cursors.empty_claims(HERE) == before
            claim.found, claim.unsuited = found, 3
        assert cursors.empty_claims(HERE) == empty_claims
        with suppress(AbortError), cursors.claim(HERE, frozenset(), START) as claim:
            assert (claim.found, claim.unsuited) == (found, 3)
            raise AbortError


def test_the_cursors_of_unused_steps_are_forgotten() -> None:
    cursors = Cursors()
    for number in range(1000):
        with cursors.claim(("s", f"{number}"), frozenset(), START) as claim:
            claim.left = LeftAtStep(START, None, None, NEVER)
    cursors.forget_unused(START + KEPT_FOR / 2)
    assert len(cursors) == len(cursors.known) == 1000
    cursors.forget_unused(START + KEPT_FOR)
    assert len(cursors) == 0


def test_a_cursor_is_not_forgotten_during_its_first_claim() -> None:
    """What the claim finds would be lost, as when the next one begins."""
    cursors = Cursors()
    with cursors.claim(HERE, frozenset(), START) as claim:
        cursors.forget_unused(START)
        claim.found, claim.left = 5, LeftAtStep(START, None, None, NEVER)
        claim.not_before = 1.0
    assert cursors.not_before(HERE) == 1.0
