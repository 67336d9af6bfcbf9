"""The shared small model: its size, its batches, and that it learns."""

import math

import pytest
import torch

from memlens.models.byte_lm import byte_batches, byte_lm, fit, held_out_loss, shakespeare
from memlens.models.tiny import train


def test_it_has_381_600_parameters_and_starts_uniform(generator):
    model = byte_lm(generator)
    assert sum(p.numel() for p in model.parameters()) == 381_600
    assert held_out_loss(model, torch.randint(256, (500,), generator=generator)) == pytest.approx(math.log(256), abs=0.05)
    again = byte_lm(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_targets_are_the_bytes_that_follow(generator):
    x, y = next(byte_batches(torch.arange(200), generator, length=50, batch=4))
    assert x.shape == y.shape == (4, 50)
    assert torch.equal(x + 1, y)
    rows = [next(byte_batches(torch.arange(51), generator, length=50, batch=99))[0]]
    assert (rows[0] == torch.arange(50)).all()  # the only window there is


def test_held_out_loss_reads_every_window_once(generator):
    """A model that knows the next byte for even positions only."""
    ids = torch.arange(101) % 7

    class Half(torch.nn.Module):
        def forward(self, x):
            sure = torch.nn.functional.one_hot((x + 1) % 7, 256).float() * 100
            return torch.where((torch.arange(x.shape[1]) % 2 == 0)[:, None], sure, torch.zeros(256))

    assert held_out_loss(Half(), ids, length=10) == pytest.approx(math.log(256) / 2, rel=1e-4)


def test_it_learns_shakespeare(generator):
    ids, held = shakespeare()
    assert len(ids) > 500_000
    assert len(held) == 9_601
    model = byte_lm(generator)
    train(model, byte_batches(ids, generator, length=32, batch=8), steps=25, warmup=5)
    assert held_out_loss(model, held[:1000], length=32) < 4.3  # 5.55 untrained


def test_fits_with_one_seed_see_the_same_weights_and_batches():
    def frozen(model):
        return torch.optim.SGD(model.parameters(), lr=0.0)

    first, again, other = (fit(frozen, seed=seed, steps=2) for seed in (3, 3, 4))
    assert torch.equal(first.losses, again.losses)
    assert first.held_out == again.held_out
    assert not torch.equal(first.losses, other.losses)


def test_what_is_refused(generator):
    with pytest.raises(ValueError, match="longer text"):
        next(byte_batches(torch.arange(10), generator, length=10))
    with pytest.raises(ValueError, match="longer text"):
        held_out_loss(byte_lm(generator), torch.arange(10))
