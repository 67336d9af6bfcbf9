"""Exact attention against torch's scaled dot product attention: forward, training step, and what only ours returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens.attention import attend, block_attend
from memlens.bench.case import Case

__all__ = ["cases"]

PEER = "torch scaled_dot_product_attention"


def cases() -> list[Case]:
    """Forward and forward + backward, with grouped heads, with lse, with a mask, at decode, and with blocks skipped."""
    generator = torch.Generator().manual_seed(0)
    small, large, one = (_inputs(generator, *size) for size in ((128, 128), (1024, 1024), (1, 4096)))
    mask = torch.rand(1, 1, 1, 1024, generator=generator) < 0.9
    causal_mask = mask & torch.ones(1024, 1024, dtype=torch.bool).tril()
    return [
        _case("forward 1x9/3x128x64", small, lambda q, k, v: attend(q, k, v), _sdpa, repeat=20),
        _case("forward 1x9/3x1024x64", large, lambda q, k, v: attend(q, k, v), _sdpa),
        _case("forward with lse 1x9/3x1024x64", large, lambda q, k, v: attend(q, k, v, return_lse=True), _sdpa),
        _case("decode 1x9/3x1 of 4096x64", one, lambda q, k, v: attend(q, k, v), _sdpa_full, repeat=20),
        _case(
            "padding mask 1x9/3x1024x64", large, lambda q, k, v: attend(q, k, v, mask=mask),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask, enable_gqa=True),
        ),
        _training("forward and backward 1x9/3x128x64", small, repeat=20),
        _training("forward and backward 1x9/3x1024x64", large),
        _sparse(generator),
    ]  # fmt: skip


def _inputs(generator: torch.Generator, q_len: int, k_len: int) -> list[Tensor]:
    shapes = ((9, q_len), (3, k_len), (3, k_len))
    return [torch.randn(1, heads, length, 64, generator=generator) for heads, length in shapes]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _sdpa_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _flops(q: Tensor, k: Tensor) -> float:
    """Of the visible half of the scores and their weighted sum (all of them for one query)."""
    pairs = q.shape[2] * k.shape[2] / (2 if q.shape[2] > 1 else 1)
    return 4.0 * q.shape[1] * pairs * q.shape[-1]


def _case(name: str, inputs: list[Tensor], ours: Callable, peer: Callable, *, repeat: int = 1) -> Case:
    def calls(fn: Callable) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeat):
                fn(*inputs)

        return run

    name += f", {repeat} calls" if repeat > 1 else ""
    moved = 4.0 * repeat * (sum(x.numel() for x in inputs) + inputs[0].numel())
    return Case(f"attend {name}", calls(ours), calls(peer), PEER, repeat * _flops(*inputs[:2]), moved)


def _training(name: str, inputs: list[Tensor], *, repeat: int = 1) -> Case:
    leaves = [x.clone().requires_grad_() for x in inputs]

    def step(fn: Callable) -> Callable:
        return lambda q, k, v: torch.autograd.grad(fn(q, k, v).sum(), (q, k, v))

    case = _case(name, leaves, step(attend), step(_sdpa), repeat=repeat)
    return case._replace(flops=3.5 * case.flops, bytes=3.0 * case.bytes)


def _sparse(generator: torch.Generator) -> Case:
    """A quarter of the blocks against torch with the same mask spread out over pairs."""
    q, k, v = (torch.randn(1, 2, 2048, 64, generator=generator) for _ in range(3))
    blocks = torch.rand(1, 1, 16, 16, generator=generator).argsort(-1) < 4
    mask = blocks.repeat_interleave(128, 2).repeat_interleave(128, 3)
    return Case(
        "block_attend 25% of 2048x2048, 2 heads",
        lambda: block_attend(q, k, v, blocks, block_q=128, block_k=128, causal=False),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        f"{PEER}, masked", 4.0 * 2 * 2048 * 512 * 64, 16.0 * q.numel(),
    )  # fmt: skip
