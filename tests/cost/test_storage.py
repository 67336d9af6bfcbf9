"""Pages counted by hand, and the parts of a step that a context does or does not change."""

import pytest
import torch

from memlens.cost.storage import A6000_HOST, OPT_13B, Sparse, flash_pages, offload_step


def test_pages_by_hand():
    assert flash_pages(torch.tensor([0, 1, 15, 16, 47])).item() == 3
    assert flash_pages(torch.tensor([[5, 4], [0, 31]]), 4).tolist() == [1, 2]
    assert flash_pages(torch.tensor([40, 3, 2])).item() == 2  # in any order
    assert flash_pages(torch.empty(2, 0, dtype=torch.int64)).tolist() == [0, 0]


@pytest.mark.parametrize("k", [1, 16, 17, 60, 100])
def test_pages_lie_between_the_bounds(k, generator):
    length, page = 100, 16
    idx = torch.rand(50, length, generator=generator).argsort(-1)[:, :k]
    pages = flash_pages(idx, page)
    assert int(pages.min()) >= -(-k // page)
    assert int(pages.max()) <= min(k, -(-length // page))
    assert flash_pages(torch.arange(k), page) == -(-k // page)
    assert pages.tolist() == [len({int(i) // page for i in row}) for row in idx]


def test_bad_indices_are_refused():
    with pytest.raises(ValueError, match="repeated"):
        flash_pages(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="token -1"):
        flash_pages(torch.tensor([-1, 1]))
    with pytest.raises(ValueError, match="tokens_per_page=0"):
        flash_pages(torch.tensor([1]), 0)


def test_the_bytes_over_the_link():
    """Linear in the context for an SSD, independent of it for a computational drive, none for the GPU."""
    steps = {where: [offload_step(OPT_13B, 64, n, where) for n in (1024, 2048)] for where in ("gpu", "host", "ssd", "csd")}
    for where in ("host", "ssd"):
        assert steps[where][1].moved == 2 * steps[where][0].moved == 2 * 64 * 2048 * 40 * 5120 * 2
    assert steps["csd"][0].moved == steps["csd"][1].moved == 64 * 40 * 4 * 5120 * 2  # q, k, v and the output
    assert steps["gpu"][1].moved == 0
    assert steps["csd"][1].read == steps["ssd"][1].read


def test_each_rate_matters_where_it_should():
    base = {where: offload_step(OPT_13B, 64, 2048, where, Sparse()) for where in ("gpu", "host", "ssd", "csd")}
    slower = {
        "gpu_memory": {"gpu"}, "host_link": {"host"}, "ssd_link": {"ssd", "csd"}, "flash": {"csd"},
    }  # fmt: skip
    for rate, places in slower.items():
        machine = A6000_HOST._replace(**{rate: getattr(A6000_HOST, rate) / 10})
        for where, step in base.items():
            again = offload_step(OPT_13B, 64, 2048, where, Sparse(), machine=machine)
            changed = again.cache + again.exchange > step.cache + step.exchange
            assert changed == (where in places), (rate, where)
    four = offload_step(OPT_13B, 64, 2048, "csd", machine=A6000_HOST._replace(drives=4))
    assert 4 * four.cache == offload_step(OPT_13B, 64, 2048, "csd").cache


def test_sparse_reads_pages_and_passes_tokens():
    step = offload_step(OPT_13B, 1, 1600, "csd", Sparse(channels=0.25, tokens=0.125, pages=0.5))
    whole = OPT_13B.cache_bytes(1, 1600)
    assert step.read == whole * 0.125 + whole * 0.5
    same = offload_step(OPT_13B, 1, 1600, "csd", Sparse(channels=0.0, tokens=1.0, pages=1.0))
    assert same == offload_step(OPT_13B, 1, 1600, "csd")
    with pytest.raises(ValueError, match="pages"):
        offload_step(OPT_13B, 1, 16, "csd", Sparse(pages=1.5))
    with pytest.raises(ValueError, match="did you mean"):
        offload_step(OPT_13B, 1, 16, "cds")
