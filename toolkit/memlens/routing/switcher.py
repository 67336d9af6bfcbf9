"""A tiny classifier on a prompt's hidden states that decides whether it needs the reasoning adapter.

    summary = smooth(chunk_means(hidden, chunk=128))            # (B, d): what the prompt is about, newest chunks most
    p = decide(switcher, summary)                               # (B,) probability that reasoning is needed

Source: efficient reasoning on the edge, arXiv:2603.16867: hidden size 8, ReLU, dropout 0.2, chunks of 128 tokens, smoothing
0.5, Gaussian noise of 0.5 while training. Features are standardised here with the training set's mean and deviation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = ["Switcher", "chunk_means", "decide", "smooth", "train_switcher"]


class Switcher(NamedTuple):
    mean: Tensor  # (d,) of the training features
    spread: Tensor  # (d,)
    w1: Tensor  # (hidden, d)
    b1: Tensor  # (hidden,)
    w2: Tensor  # (hidden,)
    b2: Tensor  # ()


def chunk_means(hidden: Tensor, *, chunk: int = 128, mask: Tensor | None = None) -> Tensor:
    """Mean hidden state of each chunk of tokens, (B, chunks, d); the last chunk may be shorter.

    Args:
        hidden: (B, L, d), final hidden states.
        mask: (B, L), 0 for padding; a chunk of padding only is NaN, which `smooth` skips.
    Raises:
        ValueError: no tokens, a chunk below 1.
    """
    check.shapes("chunk_means", hidden=(hidden, "batch length d"), mask=(mask, "batch length"))
    check.at_least("chunk_means", 1, chunk=chunk, length=hidden.shape[1])
    real = torch.ones(hidden.shape[:2]) if mask is None else mask.to(hidden)
    sums = [
        (h * r[..., None]).sum(1) / r.sum(1, keepdim=True) for h, r in zip(hidden.split(chunk, 1), real.split(chunk, 1))
    ]
    return torch.stack(sums, 1)


def smooth(means: Tensor, *, alpha: float = 0.5) -> Tensor:
    """The exponential average over chunks, (B, d): state = alpha new + (1 - alpha) state, begun with the first chunk.

    Args:
        means: (B, chunks, d); chunks that are NaN leave the state as it is.
        alpha: in [0, 1].
    """
    check.shapes("smooth", means=(means, "batch chunks d"))
    check.within("smooth", 0, 1, alpha=alpha)
    state = means[:, 0]
    for new in means[:, 1:].unbind(1):
        mixed = torch.where(state.isnan(), new, alpha * new + (1 - alpha) * state)
        state = torch.where(new.isnan(), state, mixed)
    check.finite("smooth", state=state)
    return state


def decide(switcher: Switcher, summary: Tensor) -> Tensor:
    """The probability that a prompt needs reasoning, (B,), from its summary (B, d)."""
    check.shapes("decide", summary=(summary, "batch d"), w1=(switcher.w1, "hidden d"))
    return _logit(switcher, summary).sigmoid()


def _logit(s: Switcher, x: Tensor, drop: Tensor | None = None) -> Tensor:
    hidden = (((x - s.mean) / s.spread) @ s.w1.T + s.b1).relu()
    return (hidden if drop is None else hidden * drop) @ s.w2 + s.b2


def train_switcher(
    summary: Tensor, label: Tensor, *, generator: torch.Generator, hidden: int = 8, steps: int = 200, lr: float = 0.01,
    noise: float = 0.5, dropout: float = 0.2,
) -> Switcher:  # fmt: skip
    """A switcher trained on summaries (n, d) and labels (n,), 1 where reasoning is needed.

    Args:
        generator: draws first weights, noise and dropout.
        noise: deviation of what is added to a summary, in units of the features' deviation.
        dropout: share of hidden units left out, in [0, 1).
    Raises:
        ValueError: labels other than 0 and 1, or only one of them.
    """
    check.shapes("train_switcher", summary=(summary, "n d"), label=(label, "n"))
    check.at_least("train_switcher", 1, hidden=hidden, steps=steps)
    check.within("train_switcher", 0, 0.99, dropout=dropout)
    label = label.float()
    if sorted(label.unique().tolist()) != [0.0, 1.0]:
        check.fail("train_switcher", f"labels {label.unique().tolist()}", "both 0 and 1")
    mean, spread = summary.mean(0), summary.std(0).clamp(min=1e-6)
    dim = summary.shape[1]
    first = torch.randn(hidden, dim, generator=generator) * (2 / dim) ** 0.5
    second = torch.randn(hidden, generator=generator) * hidden**-0.5
    leaves = [x.requires_grad_() for x in (first, torch.zeros(hidden), second, torch.zeros(()))]
    optimizer = torch.optim.Adam(leaves, lr=lr)
    for _ in range(steps):
        noisy = summary + noise * spread * torch.randn(summary.shape, generator=generator)
        keep = (torch.rand(len(summary), hidden, generator=generator) >= dropout).float() / (1 - dropout)
        logit = _logit(Switcher(mean, spread, *leaves), noisy, keep)
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logit, label).backward()
        optimizer.step()
    return Switcher(mean, spread, *(x.detach() for x in leaves))
