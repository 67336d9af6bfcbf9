"""One shared prefix for each request: a prefix tree flattened to groups, by a greedy rule or by the best there is.

A group is computed as one prefix and the private rest of each member, so it saves (members - 1)·len(prefix). A serving engine
handles one level easily; a whole tree it does not. Source: arXiv:2412.03594, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memlens import check
from memlens.cost.serving.prefix import Node

__all__ = ["Group", "order_groups", "saved_tokens", "single_level"]

METHODS = ("greedy", "optimal")


class Group(NamedTuple):
    prefix: int  # tokens that all members begin with, computed once
    requests: tuple[int, ...]


def saved_tokens(groups: Sequence[Group]) -> int:
    """Tokens that the groups do not compute: Σ (members - 1)·prefix."""
    return sum((len(group.requests) - 1) * group.prefix for group in groups)


def single_level(tree: Node, method: str = "greedy") -> list[Group]:
    """Every request in exactly one group, each group with one prefix.

    greedy: bottom-up, a group x below c becomes a group of its own (with c's tokens in front) iff
    (members(x) - 1)·len(x) > len(c), what it saves against c's tokens computed again; else its members join c's group.
    optimal: f(v, r), the largest saving below v when r requests are handed upwards; v hands on what it got or closes one group.

    Returns:
        groups, by their first request; a request that shares nothing has a group of its own with prefix 0.
    Raises:
        ValueError: an unknown method.
    """
    check.one_of("single_level", METHODS, method=method)
    groups = _greedy(tree) if method == "greedy" else _optimal(tree)
    alone = [Group(0, (request,)) for group in groups if len(group[1]) < 2 or not group[0] for request in group[1]]
    shared = [Group(depth, tuple(sorted(members))) for depth, members in groups if len(members) > 1 and depth]
    return sorted(alone + shared, key=lambda group: group.requests[0])


def _greedy(tree: Node) -> list[tuple[int, list[int]]]:
    """Groups as (depth, members)."""
    # by node: members that stay, and promoted groups as (length from the node's own beginning, members)
    state: dict[int, tuple[list[int], list[tuple[int, list[int]]]]] = {}
    for node, _ in tree.walk():
        stay, promoted = list(node.requests), []
        for child in node.children:
            kept, groups = state.pop(id(child))
            # a child without children of its own and one request is a leaf: it is private
            candidates = [(child.length, kept), *groups] if kept else groups
            for length, members in candidates:
                if len(members) > 1 and (len(members) - 1) * length > node.length:
                    promoted.append((node.length + length, members))
                else:
                    stay += members
        state[id(node)] = stay, promoted
    stay, promoted = state[id(tree)]
    return [(tree.length, stay), *promoted]


def _optimal(tree: Node) -> list[tuple[int, list[int]]]:
    """Groups as (depth, members), by dynamic programming; time is quadratic in the number of requests."""
    best: dict[int, list[float]] = {}  # by node: f(v, r) for r handed upwards
    steps: dict[int, list[tuple[Node, list[int]]]] = {}  # by node: per child, how many it hands up for each total
    closing: dict[int, int] = {}  # by node: how many a group closed here has
    for node, depth in tree.walk():
        table = [-1.0] * len(node.requests) + [0.0]
        choices = []
        for child in node.children:
            table, chosen = _joined(table, best.pop(id(child)))
            choices.append((child, chosen))
        steps[id(node)] = choices
        # a group of one is a request that shares nothing, wherever it is closed
        value, count = max((saved + max(r - 1, 0) * depth, r) for r, saved in enumerate(table) if saved >= 0)
        closing[id(node)] = count
        best[id(node)] = [value, *table[1:]]
    return _traced(tree, steps, closing)


def _joined(table: list[float], child: list[float]) -> tuple[list[float], list[int]]:
    """max-plus convolution of two tables, and which part the child contributed to each total."""
    out, chosen = [-1.0] * (len(table) + len(child) - 1), [0] * (len(table) + len(child) - 1)
    for r, saved in enumerate(table):
        if saved < 0:
            continue
        for s, more in enumerate(child):
            if more >= 0 and saved + more > out[r + s]:
                out[r + s], chosen[r + s] = saved + more, s
    return out, chosen


def _traced(tree: Node, steps: dict, closing: dict) -> list[tuple[int, list[int]]]:
    """The groups behind the best value: from the root down, who hands how many to whom."""
    groups: list[tuple[int, list[int]]] = []
    todo: list[tuple[Node, int, int, list[int] | None]] = [(tree, tree.length, 0, None)]
    while todo:
        node, depth, handed, sink = todo.pop()
        if handed == 0:  # v closes its own group, or got nothing
            sink, handed = [], closing[id(node)]
            groups.append((depth, sink))
        sink += node.requests
        for child, chosen in reversed(steps[id(node)]):
            part = chosen[handed]
            handed -= part
            todo.append((child, depth + child.length, part, sink))
    return [group for group in groups if group[1]]


def order_groups(groups: Sequence[Group], prompts: Sequence[int], outputs: Sequence[int]) -> list[Group]:
    """Groups by tokens to write over tokens to read, largest first: long writers start early and later prefills fill in.

    Args:
        prompts, outputs: tokens of each request, in the order of the batch; a prefix is read once.
    """
    check.at_least("order_groups", 1, groups=len(groups))

    def ratio(group: Group) -> float:
        read = group.prefix + sum(prompts[i] - group.prefix for i in group.requests)
        return sum(outputs[i] for i in group.requests) / read

    return sorted(groups, key=ratio, reverse=True)
