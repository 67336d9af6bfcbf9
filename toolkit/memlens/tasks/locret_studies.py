"""The experiments behind the notebook on trained retaining heads and `datasets/kv_locret`: one function for each column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from memlens import check, data
from memlens.kv.cache import Prefilled, continue_with, prefill
from memlens.kv.locret import Examples, Head, RetainingHeads, chunked_prefill, examples, train_retaining_heads
from memlens.kv.policies import h2o, random_keep, streaming
from memlens.kv.score import retaining_scores
from memlens.kv.select import topk_keep
from memlens.models.hooks import rotary_frequencies
from memlens.tasks.cache_probes import kl_divergence
from memlens.tasks.cache_studies import TEXTS

__all__ = [
    "ARMS", "best_share", "held_out", "load_heads", "look", "overlaps", "prompt_kl", "read_heads", "read_in_chunks",
    "save_heads", "train", "training_windows",
]  # fmt: skip

PROMPT, ANSWER = 320, 64  # of a window
WINDOWS, EPOCHS, RATE, HIDDEN = 24, 6, 5e-3, 64  # the paper has 3,000 samples, one epoch, 5e-4 and 1,024
FIRST, LAST = 12_000, 30_000  # tokens of Hamlet: windows to learn from start at the first, windows to judge by at the last
LONG, REST = 1024, 95  # tokens read in chunks, tokens read afterwards
CHUNK, STABILIZERS, LOCAL, BUDGET = 128, 32, 32, 256
SINKS, ARMS = 4, ("Locret", "Locret, 4 sinks", "H2O", "streaming", "random")


def training_windows(tokenizer: Any, count: int = WINDOWS) -> list[Tensor]:
    """Windows (1, 384) of *Hamlet* that follow each other."""
    return _windows(tokenizer, "hamlet", FIRST, count)


def train(model: Any, tokenizer: Any, layers: Sequence[int] | None = None, *, hidden: int = HIDDEN) -> RetainingHeads:
    """Heads trained as the shipped ones were, of some layers or all."""
    generator = torch.Generator().manual_seed(0)
    windows = training_windows(tokenizer)
    return train_retaining_heads(
        model, windows, prompt=PROMPT, layers=layers, hidden=hidden, epochs=EPOCHS, lr=RATE, generator=generator
    )


def held_out(tokenizer: Any, name: str, count: int | None = None) -> list[Tensor]:
    """Windows (1, 384) of a text of `TEXTS` that no head was trained on; by default 32 of *Hamlet*, 8 of the others."""
    check.one_of("held_out", TEXTS, name=name)
    count = count or (32 if name == "hamlet" else 8)
    return _windows(tokenizer, name, LAST if name == "hamlet" else TEXTS[name], count)


def _windows(tokenizer: Any, name: str, start: int, count: int) -> list[Tensor]:
    ids = data.text(name, start=start, length=count * (PROMPT + ANSWER), tokenizer=tokenizer)
    return list(ids.split(PROMPT + ANSWER, 1))


def look(model: Any, windows: Sequence[Tensor], layers: Sequence[int] | None = None) -> dict[int, Examples]:
    """The examples in windows, as a batch, by layer."""
    return examples(model, torch.cat(list(windows)), PROMPT, layers)


def save_heads(heads: RetainingHeads) -> dict[str, Tensor]:
    """The weights by name, in half precision, as `load_heads` reads them."""
    named = {f"{layer}.{name}": w for layer, head in heads.layers.items() for name, w in head._asdict().items()}
    return {name: w.half().contiguous() for name, w in named.items()}


def load_heads(model: Any) -> RetainingHeads:
    """The shipped heads of all layers of SmolLM2, in float32."""
    return read_heads(model, data.cards.verified("kv_locret", "heads.safetensors"))


def read_heads(model: Any, content: bytes) -> RetainingHeads:
    """The heads in a safetensors file that holds what `save_heads` returned."""
    from safetensors.torch import load

    found = load(content)
    layers = sorted({int(name.split(".")[0]) for name in found})
    heads = {i: Head(*(found[f"{i}.{name}"].float() for name in Head._fields)) for i in layers}
    return RetainingHeads(heads, rotary_frequencies(model))


def best_share(score: Tensor, label: Tensor, share: float = 0.1) -> Tensor:
    """Of the top `share` of tokens by label, how many are in the top share by score: (..., ) in [0, 1], both (..., L)."""
    many = round(share * label.shape[-1])
    both = [torch.zeros_like(x).scatter_(-1, topk_keep(x, many), 1.0) for x in (score, label)]
    return (both[0] * both[1]).sum(-1) / many


@torch.no_grad()
def overlaps(found: Mapping[int, Examples], heads: Mapping[int, Head]) -> xr.Dataset:
    """How well scores foresee labels, means over kv heads: `trained`, `key_norm`, `correlation` (layer, window).

    `found` is `memlens.kv.locret.examples` of a batch of windows.
    """
    values = _overlap(found, heads).movedim(-1, 0)
    names = {"trained": "trained head", "key_norm": "small keys", "correlation": "correlation with the label"}
    rows = zip(names.items(), values.numpy(), strict=True)
    out = {key: (("layer", "window"), row, {"long_name": text}) for (key, text), row in rows}
    return xr.Dataset(out, {"layer": sorted(heads), "window": range(values.shape[-1])})


def _overlap(found: Mapping[int, Examples], heads: Mapping[int, Head]) -> Tensor:
    rows = []
    for layer in sorted(heads):
        *qkv, label = found[layer]
        score, norm = retaining_scores(*qkv, *heads[layer]), -qkv[1].norm(dim=-1)
        pair = (x - x.mean(-1, keepdim=True) for x in (score, label))
        correlation = torch.nn.functional.cosine_similarity(*pair, dim=-1)
        rows.append(torch.stack([best_share(score, label), best_share(norm, label), correlation], -1).mean(1))
    return torch.stack(rows)  # (layer, window, 3)


def prompt_kl(
    model: Any, tokenizer: Any, name: str, heads: RetainingHeads, arms: Sequence[str] = ARMS, *, draws: int = 1
) -> xr.Dataset:  # fmt: skip
    """After 1,024 tokens read in chunks: `kl` from the full cache (method, draw) nats, mean of 95 tokens, and `peak` (method).

    `peak` is the most tokens that a layer held at once. When the prompt ends Locret holds 256 tokens and its 32 local ones;
    the others hold as many. Only the random arm has more than one draw; the rest is NaN.
    """
    ids = data.text(name, start=TEXTS[name], length=LONG + REST, tokenizer=tokenizer)
    rest, peaks = ids[:, LONG:], []
    full = continue_with(model, prefill(model, ids[:, :LONG]).cache, rest)
    kl = torch.full((len(arms), draws), torch.nan)
    for row, arm in enumerate(arms):
        for draw in range(draws if arm == "random" else 1):
            cache = read_in_chunks(model, ids[:, :LONG], arm, heads, draw=draw).cache
            peak = max(layer.most for layer in cache.layers)
            kl[row, draw] = kl_divergence(full, continue_with(model, cache, rest)).mean()
        peaks.append(peak)
    words = {"long_name": "KL from the full cache", "units": "nats"}
    out = {"kl": (("method", "draw"), kl.numpy(), words), "peak": ("method", peaks, {"long_name": "most tokens held"})}
    return xr.Dataset(out, {"method": list(arms), "draw": range(draws)})


def read_in_chunks(model: Any, ids: Tensor, arm: str, heads: RetainingHeads, *, draw: int = 0) -> Prefilled:
    """A prompt (1, L) read 128 tokens at a time by one arm."""
    check.one_of("read_in_chunks", ARMS, arm=arm)
    if arm.startswith("Locret"):
        sizes = {"budget": BUDGET, "chunk": CHUNK, "stabilizers": STABILIZERS, "local": LOCAL}
        sizes["sinks"] = 0 if arm == "Locret" else SINKS
        return chunked_prefill(model, ids, heads, **sizes)
    held = BUDGET + LOCAL
    policy = {
        "H2O": h2o(held // 2, held // 2),
        "streaming": streaming(held, sinks=SINKS),
        "random": random_keep(held, generator=torch.Generator().manual_seed(draw), sinks=SINKS),
    }[arm]
    return prefill(model, ids, policy, CHUNK)
