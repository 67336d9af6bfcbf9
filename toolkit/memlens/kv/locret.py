"""Locret: a small trained head says, when a token is written, how much later queries will ever want it.

    heads = train_retaining_heads(model, windows, prompt=320, hidden=256, generator=generator)
    logits, cache, _ = chunked_prefill(model, ids, heads, budget=256, chunk=128, stabilizers=32, local=32)

    score_t = w2 · silu(w1 · [q_t; k_t; v_t])                    all heads side by side, before rotary positions
    label_t = max_i q_i·k_t / sqrt(D)                            over the answer's rows i and the query heads of a group
    loss    = smooth_l1(score, label) + 0.0025 · mean_t (score_t - score_{t+1})²

A score depends on its token alone and never changes, so a token can go while the prompt is still being read: no more than
budget + chunk tokens are ever held. Source: arXiv:2410.01805.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens import check
from memlens.attention.rope import unrope
from memlens.kv.policy import Block, LayerState, Policy
from memlens.kv.score import retaining_scores
from memlens.kv.select import extend, positions
from memlens.models.hooks import attention_modules, rotary_frequencies, use_attention

__all__ = [
    "Examples", "Head", "RetainingHeads", "chunked_prefill", "examples", "fit_head", "locret", "retained", "retaining_loss",
    "retaining_scores", "train_retaining_heads",
]  # fmt: skip


class Head(NamedTuple):
    """The retaining head of one layer."""

    w1: Tensor  # (hidden, (H + 2 Hkv) · D)
    w2: Tensor  # (Hkv, hidden)


class RetainingHeads(NamedTuple):
    """Heads by layer, and the rotary table that takes the positions out of cached keys again."""

    layers: Mapping[int, Head]
    inv_freq: Tensor  # (D / 2,)


class Examples(NamedTuple):
    """What a head learns from, for the prompt's tokens."""

    q: Tensor  # (B, H, T, D), before rotary positions, as k and v (B, Hkv, T, D)
    k: Tensor
    v: Tensor
    label: Tensor  # (B, Hkv, T): the largest logit that a later row gave the token


# --- the policy ----------------------------------------------------------------------------------------------------


def locret(
    heads: RetainingHeads, budget: int, *, stabilizers: int = 0, sinks: int = 0, until: int | None = None
) -> Policy:  # fmt: skip
    """Locret: after every forward, the tokens with the best predicted scores; they never change.

    Args:
        heads: one for every layer of the model.
        budget: tokens per (layer, kv head).
        stabilizers: newest tokens that stay whatever their score; they count inside the budget.
        sinks: first tokens that stay likewise; the paper has none.
        until: tokens of the text after which the policy is done: the eviction there protects no stabilizers, and what comes
            later is added and stays. None evicts for ever. `chunked_prefill` sets it.
    Raises:
        ValueError: budget < 1, stabilizers + sinks outside [0, budget], until < 1; later, a layer without a head.
    Source: arXiv:2410.01805, algorithm 1. The keys must carry their own positions: not with rolling=True.
    """
    check.at_least("locret", 1, budget=budget, until=1 if until is None else until)
    check.within("locret", 0, budget, stabilizers=stabilizers, sinks=sinks, both=stabilizers + sinks)
    return Policy("locret", partial(retained, heads=heads), budget, first=sinks, last=stabilizers, until=until, joint=True)


def retained(state: LayerState, block: Block, *, heads: RetainingHeads) -> LayerState:
    """A token is worth what the layer's head said when it came."""
    if block.layer not in heads.layers:
        trained = f"a head for each layer; these have {sorted(heads.layers)}"
        check.fail("locret", f"layer {block.layer} without a head", trained, "train it with train_retaining_heads")
    count, held = block.q.shape[2], state.stream
    place = positions(held, count, block.pad)[:, :1, -count:]
    q, k = (unrope(x[:, :, -count:], place, heads.inv_freq) for x in (block.q, block.k))
    fresh = retaining_scores(q, k, block.v[:, :, -count:], *heads.layers[block.layer])
    return state._replace(stream=extend(held, torch.cat((torch.zeros_like(held.score), fresh), -1), pad=block.pad))


@torch.no_grad()
def chunked_prefill(
    model: Any, ids: Tensor, heads: RetainingHeads, *, budget: int, chunk: int = 3072, stabilizers: int = 2500,
    local: int = 100, sinks: int = 0,
):  # fmt: skip
    """Read a prompt `chunk` tokens at a time, never holding more than budget + chunk; a `memlens.kv.cache.Prefilled`.

    The last `local` tokens come after the last eviction and stay, on top of the budget; so do those decoded later.

    Args:
        ids: (B, L).
        budget, stabilizers, sinks: as in `locret`.
    Raises:
        ValueError: local outside [0, chunk], or no token before the local ones; and as `locret`.
    Source: arXiv:2410.01805, algorithm 1; the defaults are those of its code.
    """
    from memlens.kv.cache import continue_with, prefill

    check.shapes("chunked_prefill", ids=(ids, "batch length"))
    check.at_least("chunked_prefill", 1, chunk=chunk)
    check.within("chunked_prefill", 0, chunk, local=local)
    main = ids.shape[1] - local
    check.at_least("chunked_prefill", 1, f"of {ids.shape[1]} tokens {local} are local", tokens_before_local=main)
    policy = locret(heads, budget, stabilizers=stabilizers, sinks=sinks, until=main)
    filled = prefill(model, ids[:, :main], policy, chunk)
    if local == 0:
        return filled
    return filled._replace(logits=continue_with(model, filled.cache, ids[:, main:], keep=1)[:, -1])


# --- training ------------------------------------------------------------------------------------------------------


def train_retaining_heads(
    model: Any, windows: Sequence[Tensor], *, prompt: int, layers: Sequence[int] | None = None, hidden: int = 1024,
    epochs: int = 1, lr: float = 5e-4, generator: torch.Generator,
) -> RetainingHeads:  # fmt: skip
    """Heads for the layers of a frozen model, from windows of text.

    Args:
        windows: ids (B, L) each; the rows after `prompt` are the answer whose attention the heads learn to foresee.
        layers: which; default all. The model runs no further than the last one.
        hidden, epochs, lr: as in `fit_head`.
    Raises:
        ValueError: no window, a prompt that leaves no answer, a layer that the model lacks.
    Source: arXiv:2410.01805, section 3.3: one epoch over 3,000 long samples.
    """
    check.at_least("train_retaining_heads", 1, windows=len(windows))
    seen = [examples(model, ids, prompt, layers) for ids in windows]
    options = {"hidden": hidden, "epochs": epochs, "lr": lr, "generator": generator}
    return RetainingHeads({i: fit_head([x[i] for x in seen], **options) for i in seen[0]}, _frequencies(model))


@torch.no_grad()
def examples(model: Any, ids: Tensor, prompt: int, layers: Sequence[int] | None = None) -> dict[int, Examples]:
    """What each layer's head can learn from one forward over `ids` (B, L), by layer.

    Raises:
        ValueError: a prompt outside [1, L - 1], a layer that the model lacks.
    """
    check.shapes("examples", ids=(ids, "batch length"))
    check.within("examples", 1, ids.shape[1] - 1, prompt=prompt)
    wanted = sorted(attention_modules(model)) if layers is None else sorted(layers)
    place, inv_freq, found = torch.arange(prompt, device=ids.device), _frequencies(model), {}
    for layer, (q, k, v) in _captured(model, ids, wanted).items():
        rows = q[:, :, prompt:].unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, Hkv, g · answer, D)
        early = k[:, :, :prompt]
        label = (rows @ early.transpose(-1, -2)).amax(2) * q.shape[-1] ** -0.5
        before = (unrope(x, place, inv_freq) for x in (q[:, :, :prompt], early))
        found[layer] = Examples(*before, v[:, :, :prompt].clone(), label)
    return found


class _Enough(Exception):
    """The last layer that was asked for has run."""


def _captured(model: Any, ids: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for layer in layers:
        check.one_of("examples", map(str, attention_modules(model)), layers=str(layer))

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, offset: int) -> None:
        if layer in layers:
            found[layer] = (q, k, v)
        if layer == layers[-1]:
            raise _Enough

    with suppress(_Enough), use_attention(model, keep):
        model.base_model(input_ids=ids, use_cache=False)
    return found


def _frequencies(model: Any) -> Tensor:
    found = rotary_frequencies(model)
    if found is None:
        check.fail("locret", "a model without plain rotary positions", "one rotary table, over whole heads")
    return found


def fit_head(
    batches: Sequence[Examples], *, hidden: int, epochs: int = 1, lr: float = 5e-4, warmup: float = 2 / 3,
    generator: torch.Generator,
) -> Head:  # fmt: skip
    """One layer's head, trained with AdamW on a batch at a time, in a new order each epoch.

    The rate rises in a line for a share `warmup` of the steps and falls to 0 in the rest; gradients are clipped at 0.5.

    Raises:
        ValueError: no batch, hidden or epochs below 1, lr <= 0, warmup outside [0, 1].
    Source: arXiv:2410.01805, section 3.3 and its code: 2,000 of 3,000 steps are warm-up.
    """
    check.at_least("fit_head", 1, batches=len(batches), hidden=hidden, epochs=epochs)
    check.within("fit_head", 1e-12, 1.0, lr=lr)
    check.within("fit_head", 0.0, 1.0, warmup=warmup)
    first = batches[0]
    inputs = sum(x.shape[1] for x in first[:3]) * first.q.shape[-1]
    shapes = ((hidden, inputs), (first.k.shape[1], hidden))
    head = Head(*((torch.randn(s, generator=generator) * s[1] ** -0.5).to(first.q.device).requires_grad_() for s in shapes))
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(head, lr=lr, betas=(0.9, 0.95))
    rise = max(1, round(warmup * steps))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / rise, (steps - t) / max(1, steps - rise)))
    for _ in range(epochs):
        for i in torch.randperm(len(batches), generator=generator).tolist():
            *qkv, label = batches[i]
            optimizer.zero_grad()
            retaining_loss(retaining_scores(*qkv, *head), label).backward()
            torch.nn.utils.clip_grad_value_(head, 0.5)
            optimizer.step()
            rate.step()
    return Head(*(w.detach() for w in head))


def retaining_loss(score: Tensor, label: Tensor, *, smooth: float = 0.0025) -> Tensor:
    """smooth_l1(score, label) + smooth · mean (score_t - score_{t+1})², both (B, Hkv, T): a number.

    Raises:
        ValueError: shapes that disagree.
    """
    check.shapes("retaining_loss", score=(score, "batch kv_heads length"), label=(label, "batch kv_heads length"))
    step = score.diff(dim=-1)
    return F.smooth_l1_loss(score, label) + (smooth * step.square().mean() if step.numel() else 0.0)
