"""What each policy remembers of one text, and `datasets/kv_remembered`: a text that can be asked about in four ways.

    facts | prose | codes | prose |               then the prose goes on
      |       |       |                             `-- continuation  KL from the full cache
      |       |       `-- lookup                    the codes, each asked for once
      |       `-- copy                              a span of the prose comes again
      `-- memory                                    what was said first, and never again

The text is read once; every policy compresses it before it knows what will be asked, and each question gets a fork of what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor

from memlens import check, data
from memlens.kv.adapter import PolicyCache
from memlens.kv.budget import prefix_search, tokens
from memlens.kv.cache import Prefilled, compress, continue_with, prefill
from memlens.kv.d2o import layer_density
from memlens.kv.locret import RetainingHeads
from memlens.kv.policies import (
    Policy,
    d2o,
    elastic,
    h2o,
    keyformer,
    locret,
    prefixkv,
    random_keep,
    scissorhands,
    sirllm,
    snapkv,
    streaming,
    tova,
)
from memlens.kv.prefixkv import layer_mass, prefix_curves
from memlens.tasks.cache_probes import Lookup, code_lookup, kl_divergence
from memlens.tasks.cache_studies import TEXTS
from memlens.tasks.long_memory import Chat, long_memory

__all__ = [
    "BUDGETS", "POLICIES", "TASKS", "TEXTS", "Reader", "Reading", "ends", "grid", "held_by", "kept", "kept_by_part", "known",
    "nothing", "policies", "read", "reading", "recall", "share_kept",
]  # fmt: skip

BUDGETS = (0.1, 0.2, 0.4)  # shares of the text
POLICIES = (
    "streaming", "random", "TOVA", "H2O", "Scissorhands", "Keyformer", "SnapKV", "SirLLM", "Locret", "PrefixKV", "D2O", "Elastic",
)  # fmt: skip
TASKS = ("memory", "lookup", "copy", "continuation")
BEFORE, CODES, AFTER, REST = 200, 8, 96, 64  # tokens of prose, lines of codes, tokens of prose; tokens that follow
SPAN, LEAD = 64, 16  # a span of the first prose comes again: its tokens, and those of them that are not scored
SINKS, RECENT = 4, 16


class Reading(NamedTuple):
    """One text and what can be asked about it."""

    ids: Tensor  # (1, L), what is read and compressed
    parts: dict[str, range]  # where the facts, the prose, the codes and the rest of the prose stand in it
    chat: Chat
    lookup: Lookup
    span: Tensor  # (1, 64), from the middle of the first prose
    rest: Tensor  # (1, 64), what follows


def reading(tokenizer: Any, name: str) -> Reading:
    """The text made of two facts, prose of one of `TEXTS`, eight codes with names of their own, and more prose.

    Raises:
        ValueError: an unknown name.
    """
    check.one_of("reading", TEXTS, name=name)
    draw = torch.Generator().manual_seed(list(TEXTS).index(name))
    chat = long_memory(tokenizer, talk=1, generator=draw)
    lookup = code_lookup(tokenizer, items=CODES, generator=draw)
    while bool(torch.isin(lookup.questions[:, 3], chat.facts).any()):  # a name that has a code already
        lookup = code_lookup(tokenizer, items=CODES, generator=draw)
    prose = data.text(name, start=TEXTS[name], length=BEFORE + AFTER + REST, tokenizer=tokenizer)
    before, after, rest = prose.split((BEFORE, AFTER, REST), 1)
    parts, start = {}, 0
    for part, ids in (("facts", chat.facts), ("prose", before), ("codes", lookup.context), ("more prose", after)):
        parts[part] = range(start, start + ids.shape[1])
        start += ids.shape[1]
    first = (BEFORE - SPAN) // 2
    ids = torch.cat((chat.facts, before, lookup.context, after), 1)
    return Reading(ids, parts, chat, lookup, before[:, first : first + SPAN], rest)


class Reader(NamedTuple):
    """A text that the model has read in full."""

    model: Any
    text: Reading
    filled: Prefilled
    full: Tensor  # (1, 64, V), the logits of what follows on the full cache
    curves: Tensor  # (layers, L), PrefixKV's
    density: Tensor  # (layers,), D2O's
    heads: RetainingHeads  # Locret's


@torch.no_grad()
def read(model: Any, text: Reading, heads: RetainingHeads) -> Reader:
    """Read the text once, for all policies; `heads` are `locret_studies.load_heads(model)`."""
    filled = prefill(model, text.ids, keep_queries=True)
    full = continue_with(model, filled.cache.fork(), text.rest)
    return Reader(model, text, filled, full, prefix_curves(layer_mass(filled)), layer_density(filled), heads)


# --- the policies --------------------------------------------------------------------------------------------------


def policies(reader: Reader, share: float, *, draw: int = 0) -> dict[str, Policy]:
    """Every policy with a share of the text, as the papers set them as far as a budget this small allows.

    Each holds the same number of tokens, in the mean over layers; of D2O's the layers' own rounding may differ by one.
    Scissorhands drops one token at a time. `draw` seeds those that are random.
    """
    layers, length = reader.curves.shape
    count = tokens(length=length, ratio=share)
    counts = prefix_search(reader.curves, layers * count, SINKS)
    noise = {"generator": torch.Generator().manual_seed(draw)}
    made = {
        "streaming": streaming(count, sinks=SINKS),
        "random": random_keep(count, sinks=SINKS, **noise),
        "TOVA": tova(count),
        "H2O": h2o(count // 2, count - count // 2),
        "Scissorhands": scissorhands(count, drop=0.0),
        "Keyformer": keyformer(count, **noise),
        "SnapKV": snapkv(count, window=RECENT),
        "SirLLM": sirllm(start=SINKS, entropy=count - SINKS - RECENT, recent=RECENT),
        "Locret": locret(reader.heads, count, stabilizers=RECENT),
        "PrefixKV": prefixkv([one / length for one in counts], distance=1 - min(counts)),
        "D2O": d2o(share, density=reader.density, first=SINKS),
        "Elastic": elastic(1 - count / length),
    }
    return {name: made[name] for name in POLICIES}


def held_by(reader: Reader, policy: Policy) -> PolicyCache:
    """What the policy leaves of the text. One that needs the logits reads the text itself."""
    if policy.hears:
        return prefill(reader.model, reader.text.ids, policy).cache
    return compress(reader.filled, policy)


# --- what is kept --------------------------------------------------------------------------------------------------


def kept(cache: PolicyCache) -> xr.DataArray:
    """Which tokens each layer and kv head holds: (layer, kv_head, token) float32, 1 for held. Of a merge, the anchors."""
    layers, (_, heads, _) = len(cache.layers), cache.positions(0).shape
    mark = torch.zeros(layers, heads, cache.get_seq_length())
    for layer in range(layers):
        mark[layer].scatter_(-1, cache.positions(layer)[0].long(), 1.0)
    coords = {"layer": range(layers), "kv_head": range(heads), "token": range(mark.shape[-1])}
    out = xr.DataArray(mark.numpy(), coords, ("layer", "kv_head", "token"), "kept", {"long_name": "kept"})
    out.kv_head.attrs["long_name"], out.token.attrs["long_name"] = "kv head", "position in the text"
    return out


def share_kept(reader: Reader, share: float, names: Sequence[str] = POLICIES) -> xr.DataArray:
    """The share of all layers and kv heads that keep each token under each policy, (policy, token) in [0, 1]."""
    made = policies(reader, share)
    rows = [kept(held_by(reader, made[name])).mean(("layer", "kv_head")) for name in names]
    out = xr.concat(rows, xr.IndexVariable("policy", list(names)))
    return out.assign_attrs(long_name="kept by", units="share of layers and heads")


def kept_by_part(shares: xr.DataArray, parts: Mapping[str, range]) -> xr.DataArray:
    """Mean of (..., token) over each part of the text, (..., part)."""
    rows = [shares.isel(token=slice(part.start, part.stop)).mean("token") for part in parts.values()]
    return xr.concat(rows, xr.IndexVariable("part", list(parts))).transpose(..., "part")


# --- what is recalled ----------------------------------------------------------------------------------------------


@torch.no_grad()
def recall(reader: Reader, cache: PolicyCache, tasks: Sequence[str] = TASKS) -> xr.DataArray:
    """What the cache still knows, (task,) nats, lower is better; the cache stays as it was.

    memory, lookup: negative log-likelihood of a digit of the code that is asked for. copy: of a token of the span. continuation:
    KL from the full cache for a token of what follows.
    """
    model, (_, _, chat, lookup, span, rest) = reader.model, reader.text
    ask = {
        "memory": lambda: _answered(model, cache, chat.question, chat.digits),
        "lookup": lambda: _answered(model, cache, lookup.questions, lookup.digits),
        "copy": lambda: _answered(model, cache, span[:, :LEAD], span[:, LEAD:]),
        "continuation": lambda: float(kl_divergence(reader.full, continue_with(model, cache.fork(), rest)).mean()),
    }
    for task in tasks:
        check.one_of("recall", TASKS, task=task)
    out = xr.DataArray([ask[task]() for task in tasks], {"task": list(tasks)}, ("task",), "loss")
    return out.assign_attrs(long_name="what recall costs", units="nats")


def _answered(model: Any, cache: PolicyCache, asked: Tensor, answer: Tensor) -> float:
    """Mean negative log-likelihood of the answers (Q, m) to the questions (Q, n), teacher-forced in one forward."""
    twin = cache.fork()
    if len(asked) > 1:
        twin.batch_repeat_interleave(len(asked))
    logits = continue_with(model, twin, torch.cat((asked, answer[:, :-1]), 1), keep=answer.shape[1])
    return float(-logits.float().log_softmax(-1).gather(-1, answer[..., None]).mean())


def nothing(reader: Reader) -> PolicyCache:
    """A cache that has read the first token of the text and no more: what is known without the text."""
    return prefill(reader.model, reader.text.ids[:, :1]).cache


def known(loss: xr.DataArray, full: xr.DataArray, none: xr.DataArray) -> xr.DataArray:
    """Where a loss lies between that of the full cache (1) and that of a model that has not read the text (0 or less)."""
    share = (none - loss) / (none - full)
    return share.assign_attrs(long_name="remembered", units="share of what the full cache knows")


def ends(reader: Reader) -> xr.Dataset:
    """`full` and `none` (task) nats: what the questions cost with the whole text, and without it."""
    return xr.Dataset({"full": recall(reader, reader.filled.cache), "none": recall(reader, nothing(reader))})


def grid(reader: Reader, budgets: Sequence[float] = BUDGETS, names: Sequence[str] = POLICIES) -> xr.Dataset:
    """`loss` (budget, policy, task) nats and `held` (budget, policy) tokens, mean over layers, of one text."""
    losses, counts = [], []
    for share in budgets:
        made = policies(reader, share)
        caches = [held_by(reader, made[name]) for name in names]
        losses.append(xr.concat([recall(reader, cache) for cache in caches], "policy"))
        counts.append([sum(cache.held) / len(cache.held) for cache in caches])
    loss = xr.concat(losses, "budget").assign_coords(budget=list(budgets), policy=list(names))
    loss.budget.attrs = {"long_name": "budget", "units": "share of the text"}
    held = xr.DataArray(counts, {"budget": loss.budget, "policy": loss.policy}, ("budget", "policy"), "held")
    return xr.Dataset({"loss": loss, "held": held.assign_attrs(long_name="tokens held", units="per kv head")})
