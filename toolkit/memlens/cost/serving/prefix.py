"""A compact prefix tree over the token ids of a batch of prompts: what they have in common, and how much could be saved.

Computing every node once instead of once for each request below it saves Σ (leaves(v) - 1)·len(v) tokens. No grouping of whole
requests saves more. Source: arXiv:2412.03594, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from memlens import check

__all__ = ["Node", "prefix_tree", "shareable"]


@dataclass
class Node:
    """A run of tokens that the requests below share; the root's is empty."""

    tokens: tuple[int, ...] = ()
    children: list[Node] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)  # that end here, by their place in the batch

    @property
    def length(self) -> int:
        return len(self.tokens)

    def walk(self) -> Iterator[tuple[Node, int]]:
        """Every node with its depth in tokens (its own included), children before parents."""
        stack, found = [(self, self.length)], []
        while stack:
            node, depth = stack.pop()
            found.append((node, depth))
            stack.extend((child, depth + child.length) for child in node.children)
        return reversed(found)

    def below(self) -> list[int]:
        """Requests that end here or below, in the order of the batch."""
        return sorted(request for node, _ in self.walk() for request in node.requests)


def prefix_tree(requests: Sequence[Sequence[int]]) -> Node:
    """The compact prefix tree of the prompts: children begin with different tokens, inner nodes branch or end a request.

    >>> tree = prefix_tree([[1, 2, 3], [1, 2, 4], [5]])
    >>> [(node.tokens, node.requests) for node in tree.children]
    [((1, 2), []), ((5,), [2])]

    Args:
        requests: token ids of each prompt, at least one each.
    Raises:
        ValueError: no requests, or an empty prompt.
    """
    check.at_least("prefix_tree", 1, requests=len(requests))
    check.at_least("prefix_tree", 1, "give every prompt a token", length=min(map(len, requests)))
    prompts = [tuple(int(token) for token in request) for request in requests]
    root = Node()
    todo = [(root, 0, sorted(range(len(prompts)), key=prompts.__getitem__))]
    while todo:
        parent, depth, members = todo.pop()
        parent.requests = [i for i in members if len(prompts[i]) == depth]
        longer = [i for i in members if len(prompts[i]) > depth]
        for _, group in groupby(longer, key=lambda i: prompts[i][depth]):
            group = list(group)
            end = depth + _common(prompts[group[0]][depth:], prompts[group[-1]][depth:])
            child = Node(prompts[group[0]][depth:end])
            parent.children.append(child)
            todo.append((child, end, group))
    return root


def _common(first: tuple, last: tuple) -> int:
    """Length of the common beginning; of a sorted list it is that of the first and the last."""
    for place, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return place
    return min(len(first), len(last))


def shareable(tree: Node) -> int:
    """Tokens that need not be computed when every node is computed once: Σ (leaves - 1)·length."""
    leaves: dict[int, int] = {}
    total = 0
    for node, _ in tree.walk():
        leaves[id(node)] = len(node.requests) + sum(leaves[id(child)] for child in node.children)
        total += (leaves[id(node)] - 1) * node.length
    return total
