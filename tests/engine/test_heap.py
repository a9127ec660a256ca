"""The heap, against a plain dictionary."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from sequencerd.engine.heap import MAX_STALE, Heap

START = datetime(2026, 1, 1, tzinfo=UTC)
keys = st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"))
moves = st.lists(st.tuples(keys | st.none(), st.integers(0, 20)), max_size=200)


@given(moves)
def test_the_heap_is_a_dictionary_of_earliest_times(
    moves: list[tuple[tuple[str, str] | None, int]],
) -> None:
    heap: Heap[tuple[str, str]] = Heap()
    model: dict[tuple[str, str], datetime] = {}
    for key, seconds in moves:
        at = START + timedelta(seconds=seconds)
        if key is not None:
            model[key] = min(at, model.get(key, at))
            is_first = heap.push(key, at)
            assert not is_first or at == min(model.values())
        else:
            due = {k for k, due_at in model.items() if due_at <= at}
            popped = heap.pop_due(at)
            assert set(popped) == due
            assert [model[k] for k in popped] == sorted(model[k] for k in popped)
            for k in due:
                del model[k]
        assert len(heap) == len(model)
        assert heap.next_at() == min(model.values(), default=None)
        assert len(heap._heap) <= 2 * len(heap) + MAX_STALE


@given(st.lists(st.dictionaries(keys, st.integers(0, 20)), max_size=10))
def test_many_keys_are_pushed_as_one_by_one(items: list[dict[tuple[str, str], int]]) -> None:
    heap: Heap[tuple[str, str]] = Heap()
    model: dict[tuple[str, str], datetime] = {}
    for pushed in items:
        first = min(model.values(), default=None)
        found = [(key, START + timedelta(seconds=seconds)) for key, seconds in pushed.items()]
        has_changed = heap.push_all(found)
        for key, at in found:
            model[key] = min(at, model.get(key, at))
        assert has_changed == (min(model.values(), default=None) != first)
        assert len(heap) == len(model)
        assert heap.next_at() == min(model.values(), default=None)
    popped = heap.pop_due(START + timedelta(seconds=20))
    assert [model[key] for key in popped] == sorted(model.values())


def test_the_size_of_the_heap_follows_its_keys() -> None:
    heap: Heap[tuple[str, str]] = Heap()
    heap.push(("s", "other"), START + timedelta(days=30))
    for n in range(10_000):
        now = START + timedelta(seconds=n)
        heap.push(("s", "busy"), now)
        assert heap.pop_due(now) == [("s", "busy")]
        heap.push(("s", "busy"), now + timedelta(days=365))
        assert len(heap._heap) <= 2 * len(heap) + MAX_STALE
    for n in range(1000):
        heap.push(("s", str(n)), START + timedelta(days=60))
        heap.push(("s", str(n)), START)
    assert len(heap.pop_due(START)) == 1000
    assert len(heap._heap) <= 2 * len(heap) + MAX_STALE
