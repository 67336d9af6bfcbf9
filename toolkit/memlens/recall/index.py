"""Nearest vectors by cosine: all of them compared, those of a few cells, or a navigable graph.

    ids, distance, cost = flat(vectors).search(queries, k=10)
    ids, distance, cost = hnsw(vectors).search(queries, k=10, width=64)

Vectors are unit rows, distance is 1 - cosine, ties go to the lower id. An `Index` is built once. A store that grows and
forgets uses `FlatNeighbours` or `HnswNeighbours`, which give the nearest entries one after the other.

`hnsw` needs the package usearch (Apache-2.0, wheels for Linux, macOS and Windows); everything else is torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from memlens import check

__all__ = ["Cost", "FlatNeighbours", "HnswNeighbours", "Index", "Neighbours", "cells", "flat", "hnsw", "neighbours"]

ROUNDS = 12  # of k-means, after which few vectors still move


class Cost(NamedTuple):
    """What a search read, for each query (m,) int64, and the time of the whole call."""

    vectors_read: Tensor
    lists_read: Tensor
    bytes_read: Tensor
    seconds: float


class Index(NamedTuple):
    search: Callable[..., tuple[Tensor, Tensor, Cost]]  # (queries (m, d), k) -> ids (m, k) int64, distance (m, k), cost
    bytes: int  # held by the index
    stats: dict[str, Any]


def _checked(op: str, vectors: Tensor) -> Tensor:
    check.shapes(op, vectors=(vectors, "n d"))
    check.finite(op, vectors=vectors)
    vectors = vectors.float().contiguous()
    if len(vectors):
        check.within(op, 0.999, 1.001, row_norm=vectors.norm(dim=-1))
    return vectors


def _nearest(op: str, queries: Tensor, vectors: Tensor, k: int) -> Tensor:
    check.shapes(op, queries=(queries, "m d"), vectors=(vectors, "n d"))
    check.within(op, 1, max(1, len(vectors)), k=k)
    return _checked(op, queries)


def _cost(read: Tensor, lists: Tensor, dim: int, start: float) -> Cost:
    return Cost(read, lists, read * dim * 4, time.perf_counter() - start)


def flat(vectors: Tensor) -> Index:
    """Every vector is compared: exact.

    Args:
        vectors: (n, d), unit rows.
    Raises:
        ValueError: rows that are not of unit length or not finite; in a search, k outside [1, n].
    """
    vectors = _checked("flat", vectors)

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor, Cost]:
        start, queries = time.perf_counter(), _nearest("flat", queries, vectors, k)
        distance, ids = (1 - queries @ vectors.T).sort(dim=-1, stable=True)
        read = torch.full((len(queries),), len(vectors))
        return ids[:, :k], distance[:, :k], _cost(read, torch.ones_like(read), vectors.shape[1], start)

    return Index(search, vectors.nbytes, {"kind": "flat", "vectors": len(vectors)})


def cells(vectors: Tensor, *, count: int | None = None, generator: torch.Generator) -> Index:
    """The vectors are clustered, by default into about sqrt(n) cells, and a search reads the `probe` nearest cells.

    Args:
        vectors: (n, d), unit rows.
        count: cells, in [1, n].
        generator: draws the first centres; k-means on the sphere follows.
    Raises:
        ValueError: as `flat`; in a search, a probe outside [1, count], or fewer than k vectors in the cells read.
    """
    vectors = _checked("cells", vectors)
    count = max(1, round(len(vectors) ** 0.5)) if count is None else count
    check.within("cells", 1, len(vectors), count=count)
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:count]]
    for _ in range(ROUNDS):
        home = (vectors @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, home, vectors)
        empty = torch.bincount(home, minlength=count) == 0
        centres = torch.where(empty[:, None], centres, torch.nn.functional.normalize(sums, dim=-1))
    home = (vectors @ centres.T).argmax(-1)

    def search(queries: Tensor, k: int, *, probe: int = 3) -> tuple[Tensor, Tensor, Cost]:
        start, queries = time.perf_counter(), _nearest("cells", queries, vectors, k)
        check.within("cells", 1, count, probe=probe)
        opened = (queries @ centres.T).topk(probe).indices  # (m, probe)
        inside = (home == opened[..., None]).any(1)  # (m, n)
        read = inside.sum(-1)
        if int(read.min()) < k:
            check.fail("cells", f"{int(read.min())} vectors in {probe} cells", f"at least k={k}", "raise probe")
        distance, ids = (1 - queries @ vectors.T).masked_fill(~inside, torch.inf).sort(dim=-1, stable=True)
        cost = _cost(read + count, torch.full_like(read, probe), vectors.shape[1], start)
        return ids[:, :k], distance[:, :k], cost

    return Index(search, vectors.nbytes + centres.nbytes + home.nbytes, {"kind": "cells", "cells": count})


def hnsw(vectors: Tensor, *, links: int = 16, build: int = 100) -> Index:
    """A hierarchical navigable small world graph: a search follows links towards the query, approximate.

    Args:
        vectors: (n, d), unit rows.
        links: neighbours of a node; build: candidates looked at while a node is linked.
    Raises:
        ImportError: usearch is not installed; ValueError: as `flat`, links or build below 2.
    """
    graph = HnswNeighbours(vectors.shape[-1], links=links, build=build)
    vectors = _checked("hnsw", vectors)
    for number, vector in enumerate(vectors):
        graph.add(number, vector)

    def search(queries: Tensor, k: int, *, width: int = 64) -> tuple[Tensor, Tensor, Cost]:
        start, rows = time.perf_counter(), []
        for query in _nearest("hnsw", queries, vectors, k):
            rows.append(graph.search(query, k, width=width))
        ids, distance, read = (torch.stack([row[i] for row in rows]) for i in range(3))
        return ids, distance, _cost(read, torch.ones_like(read), vectors.shape[1], start)

    return Index(search, graph.nbytes, {"kind": "hnsw", "links": links, "build": build})


# --- stores that grow and forget ------------------------------------------------------------------------------------


class Neighbours(Protocol):
    """Vectors by id, added and removed one at a time."""

    def add(self, key: int, vector: Tensor) -> None: ...

    def remove(self, key: int) -> None: ...

    def nearest(self, query: Tensor) -> Iterator[tuple[int, float]]:
        """(id, cosine) of every entry, nearest first; the caller stops when it has enough."""
        ...


def neighbours(kind: str, dim: int) -> Neighbours:
    """An empty store of the kind `flat` or `hnsw`, for vectors (dim,)."""
    check.one_of("neighbours", ("flat", "hnsw"), kind=kind)
    return FlatNeighbours(dim) if kind == "flat" else HnswNeighbours(dim)


class FlatNeighbours:
    """Every entry is compared. The rows lie in one matrix that doubles when it is full."""

    def __init__(self, dim: int):
        self.dim, self._keys, self._rows = dim, [], torch.empty(16, dim)

    def add(self, key: int, vector: Tensor) -> None:
        check.shapes("FlatNeighbours", vector=(vector, f"{self.dim}"))
        if len(self._keys) == len(self._rows):
            self._rows = torch.cat((self._rows, torch.empty_like(self._rows)))
        self._rows[len(self._keys)] = vector
        self._keys.append(key)

    def remove(self, key: int) -> None:
        place, end = self._keys.index(key), len(self._keys)
        self._rows[place : end - 1] = self._rows[place + 1 : end].clone()
        del self._keys[place]

    def nearest(self, query: Tensor) -> Iterator[tuple[int, float]]:
        check.shapes("FlatNeighbours", query=(query, f"{self.dim}"))
        keys = list(self._keys)
        cosine, order = (self._rows[: len(keys)] @ query.float()).sort(descending=True, stable=True)
        yield from ((keys[place], value) for place, value in zip(order.tolist(), cosine.tolist(), strict=True))


class HnswNeighbours:
    """A graph of usearch. `nearest` asks for more and more neighbours, so that no entry is out of reach.

    Raises:
        ImportError: usearch is not installed; ValueError: links or build below 2.
    """

    def __init__(self, dim: int, *, links: int = 16, build: int = 100):
        check.at_least("hnsw", 2, links=links, build=build)
        if find_spec("usearch") is None:
            raise ImportError("hnsw: usearch is not installed; `pip install memlens[recall]`, or use the flat index")
        from usearch.index import Index as Graph

        how = {"metric": "ip", "dtype": "f32", "connectivity": links, "expansion_add": build}
        self.dim, self._graph = dim, Graph(ndim=dim, **how)

    def __len__(self) -> int:
        return len(self._graph)

    @property
    def nbytes(self) -> int:
        """Held by the graph, vectors included."""
        return int(self._graph.memory_usage)

    def add(self, key: int, vector: Tensor) -> None:
        check.shapes("HnswNeighbours", vector=(vector, f"{self.dim}"))
        self._graph.add(key, vector.float().numpy(), threads=1)  # one thread: the same graph every time

    def remove(self, key: int) -> None:
        self._graph.remove(key)

    def search(self, query: Tensor, k: int, *, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
        """ids (k,), distance (k,) and the number of vectors compared; `width` candidates are kept on the way."""
        self._graph.expansion_search = max(width, k)
        found = self._graph.search(query.float().numpy(), k, threads=1)
        ids, distance = torch.from_numpy(found.keys.astype("int64")), torch.from_numpy(found.distances.copy())
        return ids, distance, torch.tensor(found.computed_distances)

    def nearest(self, query: Tensor) -> Iterator[tuple[int, float]]:
        check.shapes("HnswNeighbours", query=(query, f"{self.dim}"))
        given: set[int] = set()
        k = 8
        while len(given) < len(self):
            ids, distance, _ = self.search(query, min(k, len(self)))
            for key, value in zip(ids.tolist(), distance.tolist(), strict=True):
                if key not in given:
                    given.add(key)
                    yield key, 1 - value
            if k >= len(self):
                return
            k *= 4
