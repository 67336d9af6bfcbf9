"""Two caches of answered requests: one shows them to a small model as examples, the other returns them as answers.

    cache = ExampleCache.empty().insert(Example(request, answer, tokens=40), vector)
    idx, cosine = cache.near(vector, k=20)
    text = cache.prompt(request, idx[:3])

    answers = SemanticCache({"chat": CategoryPolicy(0.75), "code": CategoryPolicy(0.9, ttl=3600, quota=500)})
    answers.insert(text, vector, "chat", answer, now=0.0)
    hit = answers.lookup(text, vector, "chat", now=5.0)         # a Hit, or None

Vectors are unit rows, as from `memlens.recall.embed`. Source: IC-Cache, arXiv:2501.12689, and category-aware semantic caching,
arXiv:2510.26835; prompts, records and bookkeeping are ours.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.recall.index import Index, flat, neighbours
from memlens.recall.routing import adapt, knapsack_keep

__all__ = ["CategoryPolicy", "Example", "ExampleCache", "Hit", "SemanticCache"]


class Example(NamedTuple):
    request: str
    answer: str  # of the large model
    quality: float = 1.0  # of the answer, in [0, 1]
    tokens: int = 0  # that it adds to a prompt
    gain: float = 0.0  # summed over its uses: what it added to the small model's success
    uses: int = 0
    value: float = 0.0  # offloads credited to it, decayed period by period

    @property
    def past(self) -> float:
        """Mean gain so far; 0 before the first use."""
        return self.gain / self.uses if self.uses else 0.0

    @property
    def nbytes(self) -> int:
        """Of its two texts, in UTF-8."""
        return len(self.request.encode()) + len(self.answer.encode())


class ExampleCache(NamedTuple):
    """Answered requests and their vectors. A value: every change returns another cache."""

    examples: tuple[Example, ...]
    vectors: Tensor  # (n, d) float32, unit rows

    @classmethod
    def empty(cls, dim: int = 384) -> ExampleCache:
        return cls((), torch.zeros(0, dim))

    @property
    def nbytes(self) -> list[int]:
        """Bytes that each example takes: texts and vector."""
        return [example.nbytes + 4 * self.vectors.shape[1] for example in self.examples]

    def insert(self, example: Example, vector: Tensor) -> ExampleCache:
        """With one more example at the end.

        Raises:
            ValueError: an empty text, a quality outside [0, 1], a vector of another size or not of unit length.
        """
        if not (example.request.strip() and example.answer.strip()):
            check.fail("ExampleCache", "an empty request or answer", "two texts")
        check.within("ExampleCache", 0, 1, quality=example.quality)
        return ExampleCache(
            (*self.examples, example), torch.cat((self.vectors, _unit(vector, self.vectors.shape[1])[None]))
        )

    def near(self, vector: Tensor, k: int = 20, *, index: Index | None = None, **knobs: Any) -> tuple[Tensor, Tensor]:
        """Positions and cosines of the k nearest examples, nearest first; fewer where there are fewer.

        Args:
            index: over this cache's vectors, e.g. `cells(cache.vectors, generator=...)`; default every example is compared.
            knobs: for its search, e.g. `probe=4`.
        """
        check.at_least("ExampleCache.near", 1, k=k)
        vector = _unit(vector, self.vectors.shape[1])
        if not self.examples:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        ids, distance, _ = (index or flat(self.vectors)).search(vector[None], min(k, len(self.examples)), **knobs)
        return ids[0], 1 - distance[0]

    def prompt(self, request: str, chosen: Sequence[int] | Tensor = ()) -> str:
        """The small model's prompt: the chosen examples, the last chosen first, then the request.

        The best example so stands next to the request. With none it is the zero-shot prompt.
        """
        shown = [self.examples[int(place)] for place in reversed(list(chosen))]
        return "".join(f"Request: {e.request}\nAnswer: {e.answer}\n\n" for e in shown) + f"Request: {request}\nAnswer:"

    def credit(self, chosen: Sequence[int] | Tensor, *, gain: float, offload: float = 0.0) -> ExampleCache:
        """After the chosen examples were shown: each has gained `gain`, and shares the offload that it made possible."""
        places = [int(place) for place in chosen]
        examples = list(self.examples)
        for place in places:
            old = examples[place]
            changed = {"gain": old.gain + gain, "uses": old.uses + 1, "value": old.value + offload / len(places)}
            examples[place] = old._replace(**changed)
        return self._replace(examples=tuple(examples))

    def decay(self, rate: float = 0.9) -> ExampleCache:
        """At the end of a period: credits count `rate` times as much."""
        check.within("ExampleCache.decay", 0, 1, rate=rate)
        return self._replace(examples=tuple(e._replace(value=e.value * rate) for e in self.examples))

    def replayed(self, place: int, answer: str, quality: float) -> ExampleCache:
        """After an example was generated again: the better of the two answers stays."""
        check.within("ExampleCache.replayed", 0, 1, quality=quality)
        examples = list(self.examples)
        if quality > examples[place].quality:
            examples[place] = examples[place]._replace(answer=answer, quality=quality)
        return self._replace(examples=tuple(examples))

    def evict(self, capacity: int) -> ExampleCache:
        """The examples with the largest total credit that fit into `capacity` bytes, in their order; see `knapsack_keep`."""
        keep = knapsack_keep([example.value for example in self.examples], self.nbytes, capacity)
        return ExampleCache(tuple(self.examples[place] for place in keep.tolist()), self.vectors[keep])


def _unit(vector: Tensor, dim: int) -> Tensor:
    check.shapes("cache", vector=(vector, str(dim)))
    check.finite("cache", vector=vector)
    check.within("cache", 0.999, 1.001, vector_norm=float(vector.norm()))
    return vector.float()


# --- answers --------------------------------------------------------------------------------------------------------


class CategoryPolicy(NamedTuple):
    """How one category of requests is cached."""

    threshold: float  # least cosine of a hit, in [0, 1]; 1 means the same text
    ttl: float = math.inf  # seconds that an answer lives
    quota: int | None = None  # most entries; None is no limit
    priority: int = 0  # categories with a lower one lose entries first when the whole cache is full
    enabled: bool = True
    floor: float = 0.0  # below which `adapt` never takes the threshold


class Hit(NamedTuple):
    answer: Any
    cosine: float
    text: str  # of the request that was answered
    age: float  # seconds


class _Entry(NamedTuple):
    text: str
    category: str
    written: float


class SemanticCache:
    """Answers by meaning, each category under its own policy.

    A lookup goes through the nearest entries until one is of the category and alive, and is a hit if that one is near
    enough. Only then is its answer fetched from `documents`. When a category is full, the entry used least recently
    of that category goes.

    Args:
        policies: category -> policy.
        index: "flat" or "hnsw".
        capacity: most entries of all categories together; None is no limit.
        documents: where answers lie, by entry number; a database behind the mapping protocol, by default a dict.
    Raises:
        ValueError: no policy, a threshold outside [0, 1], a floor above it, a ttl, quota or capacity that leaves no room.
    """

    def __init__(
        self, policies: Mapping[str, CategoryPolicy], *, index: str = "flat", dim: int = 384, capacity: int | None = None,
        documents: MutableMapping[int, Any] | None = None,
    ):  # fmt: skip
        check.at_least("SemanticCache", 1, policies=len(policies), capacity=1 if capacity is None else capacity)
        for name, policy in policies.items():
            check.within(f"SemanticCache {name!r}", 0, 1, threshold=policy.threshold)
            check.within(f"SemanticCache {name!r}", 0, policy.threshold, floor=policy.floor)
            check.at_least(f"SemanticCache {name!r}", 1, quota=1 if policy.quota is None else policy.quota)
            if not policy.ttl > 0:
                check.fail(f"SemanticCache {name!r}", f"ttl={policy.ttl}", "a lifetime above 0", "use enabled=False")
        self.policies, self.dim, self.capacity = dict(policies), dim, capacity
        self.documents = {} if documents is None else documents
        self._nearest, self._next = neighbours(index, dim), 0
        self._entries: dict[int, _Entry] = {}
        self._used = {name: OrderedDict[int, None]() for name in policies}  # the least recently used first
        self._written = {name: OrderedDict[int, None]() for name in policies}  # the oldest first
        self._now = -math.inf

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, category: str) -> int:
        """Entries held for a category."""
        return len(self._used[self._known(category)])

    def lookup(
        self, text: str, vector: Tensor, category: str, *, now: float, load: float = 0.0, **how: float
    ) -> Hit | None:  # fmt: skip
        """The answer of the nearest living entry of the category, if it is near enough.

        Args:
            vector: (dim,), unit length.
            now: seconds on the caller's clock.
            load: of the model behind this category, in [0, 1]; loosens the policy, with `how`, by `adapt`.
        """
        policy = adapt(self.policies[self._known(category)], load, **how)
        vector = _unit(vector, self.dim)
        self._tick(now)
        if not policy.enabled:
            return None
        # at 1 the texts decide, and a text embedded in another batch differs in the last digits
        least = policy.threshold - (1e-6 if policy.threshold < 1 else 1e-4)
        for key, cosine in self._nearest.nearest(vector):
            if cosine < least:
                return None
            entry = self._entries[key]
            alive = now - entry.written < policy.ttl
            if entry.category != category or not alive or (policy.threshold >= 1 and entry.text != text):
                continue
            self._used[category].move_to_end(key)
            return Hit(self.documents[key], min(cosine, 1.0), entry.text, now - entry.written)
        return None

    def insert(self, text: str, vector: Tensor, category: str, answer: Any, *, now: float) -> None:
        """Store an answer; what has outlived its policy goes first, then whatever quota and capacity ask for."""
        policy, vector = self.policies[self._known(category)], _unit(vector, self.dim)
        self._tick(now)
        if not policy.enabled:
            return
        self.expire(now)
        if policy.quota is not None and self.count(category) >= policy.quota:
            self._drop(next(iter(self._used[category])), category)
        if self.capacity is not None and len(self) >= self.capacity:
            least = min((name for name in self._used if self._used[name]), key=lambda name: self.policies[name].priority)
            self._drop(next(iter(self._used[least])), least)
        key, self._next = self._next, self._next + 1
        self._nearest.add(key, vector)
        self._entries[key], self.documents[key] = _Entry(text, category, now), answer
        self._used[category][key] = self._written[category][key] = None

    def expire(self, now: float, *, grace: float = 2.0) -> int:
        """Drop what is older than `grace` lifetimes; how many. A loaded category may serve what is older than one."""
        check.at_least("SemanticCache.expire", 1, grace=grace)
        before = len(self)
        for category, oldest in self._written.items():
            while oldest and now - self._entries[next(iter(oldest))].written >= grace * self.policies[category].ttl:
                self._drop(next(iter(oldest)), category)
        return before - len(self)

    def nearest(self, vector: Tensor, k: int = 1) -> list[tuple[str, float]]:
        """(text, cosine) of the k nearest entries of any category and age."""
        return [(self._entries[key].text, cosine) for key, cosine in islice(self._nearest.nearest(vector), k)]

    def _drop(self, key: int, category: str) -> None:
        self._nearest.remove(key)
        del self._entries[key], self._used[category][key], self._written[category][key], self.documents[key]

    def _tick(self, now: float) -> None:
        if not now >= self._now:
            check.fail("SemanticCache", f"now={now} after {self._now}", "a clock that does not run backwards")
        self._now = now

    def _known(self, category: str) -> str:
        check.one_of("SemanticCache", self.policies, category=category)
        return category
