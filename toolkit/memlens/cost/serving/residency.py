"""Which tokens of a batch lie in the GPU's memory: prefixes of groups, or nodes of a prefix tree under least-recently-used.

Both reserve a request's output when it is admitted, so the limit holds at every step, and count what decoding reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from memlens.cost.serving.grouping import Group
from memlens.cost.serving.prefix import Node

__all__ = ["Grouped", "Residency", "Shared"]


class Residency(Protocol):
    used: int  # tokens held or reserved, never above the memory
    read: int  # tokens of keys and values that an iteration of decoding reads

    def admit(self, i: int) -> int | None:
        """Make room for request i; returns the prompt tokens to compute, None if it does not fit now."""

    def begin(self, i: int) -> None:
        """Its prompt is computed; it writes from now on."""

    def grow(self, tokens: int) -> None:
        """Decoding wrote so many tokens."""

    def finish(self, i: int) -> None:
        """It has written all."""


class Grouped:
    """A group's prefix is computed with its first member and freed with its last; its readers read it once.

    Where groups are not run one after the other, a prefix that nobody uses just now makes room for those who need it.
    """

    def __init__(self, groups: Sequence[Group], lengths: Sequence[int], outputs: Sequence[int], memory: int):
        self.lengths, self.outputs, self.memory = lengths, outputs, memory
        self.home = {i: group for group in groups for i in group.requests}
        self.unfinished = {group: len(group.requests) for group in groups}
        self.active = dict.fromkeys(groups, 0)  # members admitted and not finished
        self.readers = dict.fromkeys(groups, 0)  # members that write
        self.resident: dict[Group, None] = {}
        self.used = self.read = 0

    def admit(self, i: int) -> int | None:
        group = self.home[i]
        need = self.lengths[i] - group.prefix + (0 if group in self.resident else group.prefix)
        idle = [other for other in self.resident if other != group and not self.active[other]]
        if self.used - sum(other.prefix for other in idle) + need + self.outputs[i] > self.memory:
            return None
        while self.used + need + self.outputs[i] > self.memory:
            self._free(idle.pop(0))
        self.resident[group] = None
        self.active[group] += 1
        self.used += need + self.outputs[i]
        return max(need, 1)  # a member that is all prefix still runs its last token, to go on from it

    def begin(self, i: int) -> None:
        group = self.home[i]
        self.read += self.lengths[i] - group.prefix + (0 if self.readers[group] else group.prefix)
        self.readers[group] += 1

    def grow(self, tokens: int) -> None:
        self.read += tokens

    def finish(self, i: int) -> None:
        group = self.home[i]
        for counts in (self.readers, self.active, self.unfinished):
            counts[group] -= 1
        own = self.lengths[i] - group.prefix
        self.read -= own + self.outputs[i] - 1 + (0 if self.readers[group] else group.prefix)
        self.used -= own + self.outputs[i]
        if not self.unfinished[group]:
            self._free(group)

    def _free(self, group: Group) -> None:
        del self.resident[group]
        self.used -= group.prefix


class Shared:
    """Nodes of the prefix tree stay after use, until room is needed: the least recently used leaf goes first.

    A node counts as cached from the moment its first reader is admitted. Every reader reads its whole context.
    """

    def __init__(self, tree: Node, lengths: Sequence[int], outputs: Sequence[int], memory: int, *, keep: bool = True):
        self.lengths, self.outputs, self.memory, self.keep = lengths, outputs, memory, keep
        self.nodes = {id(node): (node, depth) for node, depth in tree.walk()}
        self.paths = _paths(tree) if keep else {i: [] for i in range(len(lengths))}
        self.users: dict[int, int] = {}  # by resident node: requests under way that need it
        self.stamp: dict[int, int] = {}  # when a node was last given back
        self.clock = self.used = self.read = self.idle = 0  # idle: tokens that nobody needs now

    def admit(self, i: int) -> int | None:
        path = self.paths[i]
        here = [node for node in path if id(node) in self.users]
        fresh = sum(node.length for node in path[len(here) :]) + (0 if self.keep else self.lengths[i])
        waking = sum(node.length for node in here if not self.users[id(node)])
        if self.used - (self.idle - waking) + fresh + self.outputs[i] > self.memory:
            return None
        self.idle -= waking
        for node in path:  # first: what it needs is not evicted for the rest
            self.users[id(node)] = self.users.get(id(node), 0) + 1
        self.used += fresh + self.outputs[i]
        self._evict()
        return fresh if fresh else 1  # all cached: the last token runs again

    def begin(self, i: int) -> None:
        self.read += self.lengths[i]

    def grow(self, tokens: int) -> None:
        self.read += tokens

    def finish(self, i: int) -> None:
        self.clock += 1
        self.read -= self.lengths[i] + self.outputs[i] - 1
        self.used -= self.outputs[i] + (0 if self.keep else self.lengths[i])
        for node in self.paths[i]:
            self.users[id(node)] -= 1
            self.stamp[id(node)] = self.clock
            self.idle += 0 if self.users[id(node)] else node.length

    def _evict(self) -> None:
        """Give up idle nodes, least recently used and deepest first, until the limit holds: a parent outlives its children."""
        if self.used <= self.memory:
            return
        idle = [key for key, users in self.users.items() if not users]
        for key in sorted(idle, key=lambda key: (self.stamp[key], -self.nodes[key][1])):
            if self.used <= self.memory:
                return
            length = self.nodes[key][0].length
            self.used, self.idle = self.used - length, self.idle - length
            del self.users[key]


def _paths(tree: Node) -> dict[int, list[Node]]:
    """For each request, the nodes from the root's child to where it ends."""
    found: dict[int, list[Node]] = {}
    todo: list[tuple[Node, list[Node]]] = [(tree, [])]
    while todo:
        node, path = todo.pop()
        found |= dict.fromkeys(node.requests, path)
        todo.extend((child, [*path, child]) for child in node.children)
    return found
