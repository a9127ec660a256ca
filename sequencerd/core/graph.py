"""Walk graphs: the steps of a sequence, or of several, along their exits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def walk(
    starts: Iterable[Node],
    following: Callable[[Node], Iterable[Node]],
    *,
    depth_first: bool = False,
) -> Iterator[tuple[Node, Node | None]]:
    """Yield each node that can be reached, once, with the node before it (None for a start).

    Breadth first, so that following the previous nodes gives a shortest path. `following` is called
    once for each node, after it was yielded.
    """
    found: set[Node] = set()
    ahead: deque[tuple[Node, Node | None]] = deque((start, None) for start in starts)
    while ahead:
        node, before = ahead.popleft()
        if node in found:
            continue
        found.add(node)
        yield node, before
        reached = [(there, node) for there in following(node)]
        if depth_first:
            ahead.extendleft(reversed(reached))
        else:
            ahead.extend(reached)


def reach(starts: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Return all nodes that can be reached."""
    return {node for node, _ in walk(starts, following)}


def without_ends(graph: Mapping[Node, Iterable[Node]]) -> set[Node]:
    """Return the nodes from which a path continues for ever: those that lead to a cycle."""
    sources: dict[Node, list[Node]] = {}
    count = dict.fromkeys(graph, 0)
    for node, targets in graph.items():
        for target in targets:
            sources.setdefault(target, []).append(node)
            count[node] += 1

    def ended(node: Node) -> Iterator[Node]:
        for source in sources.get(node, ()):
            count[source] -= 1
            if not count[source]:
                yield source

    return graph.keys() - reach((node for node, number in count.items() if not number), ended)
