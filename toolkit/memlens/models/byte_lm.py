"""byte-lm: a byte-level decoder of 381,600 parameters that most training notebooks share, and its batches of text.

    model, losses, held_out = fit(lambda m: torch.optim.Adam(m.parameters(), lr=3e-3), seed=0)

trains in 5 to 10 seconds on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlens import check, data
from memlens.models.tiny import Attention, Layer, SwiGLU, TinyLM, lm_loss, train

__all__ = ["Fitted", "byte_batches", "byte_lm", "fit", "held_out_loss", "shakespeare"]

LENGTH, BATCH = 96, 16
PLAYS = ("hamlet", "julius_caesar", "lear", "macbeth", "othello", "romeo_and_juliet")


def byte_lm(generator: torch.Generator | None = None) -> TinyLM:
    """The preset: 256 bytes, d 96, 3 layers, 4 heads, SwiGLU of 256, RMSNorm, RoPE, untied head, normal(0, 0.02)."""
    return TinyLM([Layer(Attention, SwiGLU)] * 3, d=96, heads=4, vocab=256, generator=generator)


def shakespeare(held_out: int = 100 * LENGTH + 1) -> tuple[Tensor, Tensor]:
    """Bytes to train on (six tragedies, 840 thousand) and `held_out` bytes of The Tempest's first act, both (n,) int64."""
    text = [data.text(name, tokenizer="bytes").flatten() for name in PLAYS]
    return torch.cat(text), data.text("tempest", start=10_000, length=held_out, tokenizer="bytes").flatten()


def byte_batches(
    ids: Tensor, generator: torch.Generator, *, length: int = LENGTH, batch: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of a text as (ids, targets), each (batch, length); targets are the bytes that follow.

    Args:
        ids: (n,) or (1, n) bytes as integers, n > length.
        generator: draws where the windows begin.
    Raises:
        ValueError: a text that is no longer than `length`.
    """
    ids = ids.flatten().long()
    check.at_least("byte_batches", 1, length=length, batch=batch)
    check.at_least("byte_batches", length + 1, "pass a longer text", text=len(ids))
    windows = ids.unfold(0, length + 1, 1)
    while True:
        rows = windows[torch.randint(len(windows), (batch,), generator=generator)]
        yield rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor, *, length: int = LENGTH) -> float:
    """Mean nats per byte over a text cut into windows of `length`, the rest dropped.

    Raises:
        ValueError: a text that is no longer than `length`.
    """
    ids = ids.flatten().long()
    check.at_least("held_out_loss", length + 1, "pass a longer text", text=len(ids))
    rows = ids.unfold(0, length + 1, length)
    return float(lm_loss(model(rows[:, :-1]), rows[:, 1:]))


class Fitted(NamedTuple):
    model: TinyLM
    losses: Tensor  # (steps,) float32, nats per byte of each batch
    held_out: float  # nats per byte on text that was not trained on


def fit(optimizer: Callable[[nn.Module], torch.optim.Optimizer], *, seed: int = 0, steps: int = 120) -> Fitted:
    """A fresh byte-lm trained on Shakespeare with `train`'s warm-up and cosine, so that optimizers compare on equal terms.

    Args:
        optimizer: makes one for the model; its groups' learning rates are the peaks.
        seed: draws the weights and, with seed + 1, the batches: two optimizers see the same ones.
    """
    ids, rest = shakespeare()
    model = byte_lm(torch.Generator().manual_seed(seed))
    batches = byte_batches(ids, torch.Generator().manual_seed(seed + 1))
    losses = train(model, batches, steps=steps, optimizer=optimizer(model))
    return Fitted(model, losses, held_out_loss(model, rest))
