"""Nearest vectors: exact search by hand, the approximate ones against it, stores that grow and forget."""

import importlib.util

import pytest
import torch
from torch.nn.functional import normalize

from memlens.recall import index as module
from memlens.recall.index import FlatNeighbours, cells, flat, hnsw, neighbours

needs_usearch = pytest.mark.skipif(importlib.util.find_spec("usearch") is None, reason="pip install memlens[recall]")
KINDS = ["flat", pytest.param("hnsw", marks=needs_usearch)]


def rows(n, d=24, seed=0):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clustered(n, d=24, groups=20):
    centres, generator = rows(groups, d), torch.Generator().manual_seed(1)
    noise = 0.15 * torch.randn(n, d, generator=generator)
    return normalize(centres[torch.randint(groups, (n,), generator=generator)] + noise, dim=-1)


def test_flat_is_the_sorted_cosine_and_ties_go_to_the_lower_id():
    vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    ids, distance, cost = flat(vectors).search(torch.tensor([[1.0, 0.0]]), 4)
    assert ids.tolist() == [[1, 2, 3, 0]]
    torch.testing.assert_close(distance, torch.tensor([[0.0, 0.0, 0.4, 1.0]]))
    assert (cost.vectors_read.tolist(), cost.lists_read.tolist(), cost.bytes_read.tolist()) == ([4], [1], [32])


@needs_usearch
def test_the_graph_finds_what_flat_finds():
    vectors, queries = rows(1500), rows(200, seed=3)
    want, _, _ = flat(vectors).search(queries, 1)
    ids, distance, cost = hnsw(vectors).search(queries, 1)
    found = (ids == want).float().mean()
    assert float(found) >= 0.95
    torch.testing.assert_close(distance[:, 0], 1 - (queries * vectors[ids[:, 0]]).sum(-1), atol=1e-5, rtol=0)
    assert int(cost.vectors_read.max()) < 1500


@needs_usearch
def test_a_wider_search_reads_more_and_finds_more():
    vectors, queries = rows(1500), rows(100, seed=3)
    want = flat(vectors).search(queries, 5)[0]
    index, found, read = hnsw(vectors, links=6, build=20), [], []
    for width in (5, 400):
        ids, _, cost = index.search(queries, 5, width=width)
        found.append(float((ids[:, :, None] == want[:, None]).any(1).float().mean()))
        read.append(float(cost.vectors_read.float().mean()))
    assert found[0] < found[1]
    assert read[0] < read[1]


def test_cells_read_few_vectors_and_all_cells_are_exact(generator):
    vectors, queries = clustered(900), clustered(50)
    index, want = cells(vectors, generator=generator), flat(vectors).search(queries, 3)[0]
    assert index.stats["cells"] == 30
    ids, _, cost = index.search(queries, 3, probe=4)
    assert float((ids == want).float().mean()) >= 0.9
    assert float(cost.vectors_read.float().mean()) < 450
    assert torch.equal(index.search(queries, 3, probe=30)[0], want)


def test_too_few_vectors_in_the_cells_are_refused(generator):
    with pytest.raises(ValueError, match="raise probe"):
        cells(rows(16), count=16, generator=generator).search(rows(1), 3, probe=1)


@pytest.mark.parametrize("build", [flat, lambda v: cells(v, generator=torch.Generator())])
def test_vectors_that_are_no_unit_rows_are_refused(build):
    with pytest.raises(ValueError, match="row_norm"):
        build(2 * rows(4))
    with pytest.raises(ValueError, match="nan"):
        build(rows(4) * float("nan"))
    with pytest.raises(ValueError, match="k=5"):
        build(rows(4)).search(rows(1), 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_growing_store_gives_every_entry_nearest_first(kind):
    store, vectors, query = neighbours(kind, 24), rows(100), rows(1, seed=5)[0]
    assert list(store.nearest(query)) == []
    for key, vector in enumerate(vectors):
        store.add(key, vector)
    for key in range(0, 100, 3):
        store.remove(key)
    got = list(store.nearest(query))
    want = [key for key in (vectors @ query).argsort(descending=True).tolist() if key % 3]
    assert sorted(key for key, _ in got) == sorted(want)
    assert [key for key, _ in got[:5]] == want[:5]
    torch.testing.assert_close(torch.tensor([c for _, c in got]), vectors[[k for k, _ in got]] @ query, atol=1e-5, rtol=0)


def test_without_usearch_the_graph_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install memlens\[recall\]"):
        hnsw(rows(4))
    assert isinstance(neighbours("flat", 24), FlatNeighbours)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="did you mean 'hnsw'"):
        neighbours("hsnw", 24)
