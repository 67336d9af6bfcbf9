"""Scores that differ from H2O's sum in one step each: a count of idle rows, a noisy softmax, the token's own surprise.

Each is a step (state of a layer, block) -> state of the layer, as `memlens.kv.policies` runs them; the presets are there.

    least_below     Scissorhands: how rarely was it below uniform attention in the last rows?      arXiv:2305.17118
    noisy           Keyformer: the sum of a softmax with Gumbel noise and a rising temperature     arXiv:2403.09054
    unexpected      SirLLM: how little did the model expect it? Known only once the logits are     arXiv:2405.12528
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlens import check
from memlens.kv.score import column_mass, group_heads, gumbel_mass
from memlens.kv.select import extend

if TYPE_CHECKING:
    from memlens.kv.policies import Block, LayerState

__all__ = ["gumbel", "hear", "least_below", "noisy", "unexpected"]

NOISE = 1 << 18  # numbers drawn at a time; another size is another draw
SLOTS = 16  # the ring of counts is exact to a sixteenth of its window, and holds 16 numbers for each token


def least_below(state: LayerState, block: Block, *, window: int) -> LayerState:
    """A token is worth the more, the fewer of the last `window` rows gave it less than uniform attention, 1/t.

    The rows since it came count; of two tokens with one count the older is worth less. The counts are held in slots of
    ceil(window / 16) rows, (B, Hkv, slots, L), so that the oldest rows leave a slot at a time.
    """
    if bool((block.q.sum() + block.k.sum()).isnan()):  # a comparison would take it for a token that is never idle
        fix = "look at what produced them (a masked row, an overflow)"
        check.fail("scissorhands", "NaN among the scores", "numbers", fix)
    size = math.ceil(window / SLOTS)
    slots, before = math.ceil(window / size), state.stream
    first, stop = before.step, before.step + block.q.shape[2]  # of the rows, counted from the first token of the text
    ring = torch.zeros(*block.k.shape[:2], slots, block.k.shape[2], dtype=torch.int16, device=block.k.device)
    if "below" in before.aux:
        ring[..., : before.score.shape[-1]] = before.aux["below"]
    newest = (stop - 1) // size
    for slot in range(max(first // size, newest - slots + 1), newest + 1):
        low, high = max(first, slot * size), min(stop, (slot + 1) * size)
        count = _below(block, low - first, high - first)
        held = ring[:, :, slot % slots]
        held.copy_(count if low == slot * size else held + count)
    record = ring.sum(-2)
    order = record.sort(dim=-1, descending=True, stable=True).indices  # ties: the older first
    rank = torch.arange(order.shape[-1], dtype=torch.float32, device=order.device).expand(order.shape)
    score = torch.zeros_like(rank).scatter_(-1, order, rank)
    after = extend(before._replace(aux={"below": ring}), torch.zeros_like(score), pad=block.pad)
    return state._replace(stream=after._replace(score=score))


def _below(block: Block, low: int, high: int) -> Tensor:
    """How many of the block's rows low to high - 1, over all heads of a group, gave each key less than 1/t: (B, Hkv, L)."""
    lse = None if block.lse is None else block.lse[:, :, low:high]
    seen = {"q_start": block.q_start + low, "alive": block.alive, "scale": block.scale}
    mass = column_mass(
        block.q[:, :, low:high], block.k, lse=lse, reduce="count_below", threshold="1/t", group="sum", **seen
    )
    return mass.to(torch.int16)


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel(0, 1) noise: -log of an exponential draw."""
    return torch.empty(shape, device=generator.device).exponential_(generator=generator).log_().neg_()


def noisy(
    state: LayerState, block: Block, *, generator: torch.Generator, noise: float, tau_init: float, tau_delta: float,
    group: str,
) -> LayerState:  # fmt: skip
    """A token is worth the sum of softmax((s + noise · zeta) / tau) over the rows since it came.

    zeta is drawn afresh for each row and head. Rows of the first forward have tau_init, the t-th row after it tau_init +
    t · tau_delta. The noise is drawn for a block of rows at a time: extra memory is linear in L.
    """
    (batch, heads, rows), length, step = block.q.shape[:3], block.k.shape[2], state.stream.step
    prompt = rows if state.memory is None else state.memory
    since = torch.arange(step + 1, step + rows + 1) - prompt
    tau = (tau_init + tau_delta * since.clamp(min=0)).to(block.q.device)
    total = torch.zeros(batch, heads, length, device=block.q.device)
    many = max(1, NOISE // (batch * heads * length)) if noise else rows
    for low in range(0, rows, many):
        high = min(rows, low + many)
        seen = block.q_start + high
        zeta = noise * gumbel((batch, heads, high - low, seen), generator).to(block.q.device) if noise else None
        alive = None if block.alive is None else block.alive[..., :seen]
        options = {"q_start": block.q_start + low, "alive": alive, "scale": block.scale, "group": "none"}
        total[..., :seen] += gumbel_mass(
            block.q[:, :, low:high], block.k[:, :, :seen], tau=tau[low:high], noise=zeta, **options
        )
    mass = group_heads(total, block.k.shape[1], group)
    return state._replace(stream=extend(state.stream, mass, pad=block.pad), memory=prompt)


def unexpected(state: LayerState, block: Block, *, decay: float) -> LayerState:
    """A token will be worth its surprisal, once `hear` knows it. What was kept by an eviction fades by `decay`."""
    before = state.stream
    if before.step:
        seen = before.step - (0 if block.pad is None else block.pad[:, None, None])
        lost = (before.pos >= 0).sum(-1, keepdim=True) < seen  # then this row's last forward ended in an eviction
        before = before._replace(score=torch.where(lost, before.score * decay, before.score))
    fresh = torch.zeros(block.k.shape[:3], device=block.k.device)
    return state._replace(stream=extend(before, fresh, pad=block.pad))


def hear(state: LayerState, surprise: Tensor) -> LayerState:
    """The state once the surprisal (B, n) of the n newest tokens is known, one for all heads; +inf for the first token."""
    held, count = state.stream, surprise.shape[1]
    score = held.score.clone()
    score[..., -count:] = surprise[:, None]
    score = score.masked_fill(held.pos == 0, torch.inf).masked_fill(held.pos < 0, 0.0)
    return state._replace(stream=held._replace(score=score))
