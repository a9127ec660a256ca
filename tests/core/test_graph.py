"""One function walks graphs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core import graph

GRAPH = {"a": ["b", "c"], "b": ["d"], "c": ["d", "a"], "d": [], "e": ["a"]}


def test_breadth_first_the_nodes_before_a_node_are_a_shortest_path() -> None:
    found = list(graph.walk(["a"], GRAPH.__getitem__))
    assert found == [("a", None), ("b", "a"), ("c", "a"), ("d", "b")]


def test_depth_first_a_path_is_followed_to_its_end() -> None:
    found = [node for node, _ in graph.walk("ae", GRAPH.__getitem__, depth_first=True)]
    assert found == ["a", "b", "d", "c", "e"]


def test_steps_that_lead_to_no_cycle_are_omitted() -> None:
    assert graph.without_ends(GRAPH) == {"a", "c", "e"}


graphs = st.dictionaries(st.integers(0, 7), st.lists(st.integers(0, 7), max_size=3)).map(
    lambda found: {node: [t for t in targets if t in found] for node, targets in found.items()}
)


@given(graphs)
def test_a_walk_that_never_ends_is_longer_than_all_nodes(ways: dict[int, list[int]]) -> None:
    def is_endless(node: int) -> bool:
        ahead = {node}
        for _ in range(len(ways) + 1):
            ahead = {target for one in ahead for target in ways[one]}
        return bool(ahead)

    assert graph.without_ends(ways) == set(filter(is_endless, ways))
