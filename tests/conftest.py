"""Fixtures that every test shares: a seeded generator, fixed threads, and the one table of tolerances."""

import pytest
import torch

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


EXACT = {"rtol": 0, "atol": 0}  # integers and bools


@pytest.fixture(autouse=True)
def _fixed_threads():
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def assert_close():
    """`assert_close(got, want)`: torch.testing's, with the tolerance of `got`'s dtype, over tensors or nested tuples of them."""

    def compare(got, want, **override):
        if isinstance(got, (tuple, list)):
            assert len(got) == len(want)
            for one, other in zip(got, want, strict=True):
                compare(one, other, **override)
            return
        if got is None:
            assert want is None
            return
        torch.testing.assert_close(got, want.to(got.dtype), **{**TOLERANCES.get(got.dtype, EXACT), **override})

    return compare


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the real model, loaded once a process."""
    from memlens.models import smollm2 as load

    return load()
