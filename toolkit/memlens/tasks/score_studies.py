"""The experiments behind the notebook on eviction scores and `datasets/kv_scores`: one function for each column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from memlens import check, data
from memlens.attention.exact import attend
from memlens.kv.adapter import PolicyCache
from memlens.kv.cache import Prefilled, continue_with, stream_eval
from memlens.kv.policies import Policy, h2o, keyformer, scissorhands, sirllm, streaming
from memlens.kv.score import persistence_ratio
from memlens.tasks.cache_probes import kl_divergence
from memlens.tasks.cache_studies import CHUNK, STREAM, TEXTS
from memlens.tasks.long_memory import ask_memory, long_memory

__all__ = ["BUDGETS", "SEEDS", "fading", "memory", "persistence", "probabilities", "score_arms", "stream_scores"]

BUDGETS, START = (64, 128), 256  # tokens held of 640; the first position that is compared
DRAWS, SEEDS = 5, (0, 1, 2, 3, 4)  # noise per text, chats
SPLIT, THRESHOLDS = 271, ("1/t", "10/t")  # of 543 tokens, as half of them
HELD = 96  # in the chat


def score_arms(budget: int, draw: int = 0) -> dict[str, Policy]:
    """The policies side by side, all with `budget` tokens; `draw` seeds those that are random."""
    return {
        "streaming": streaming(budget),
        "H2O": h2o(budget // 2, budget - budget // 2),
        "Keyformer": keyformer(budget, generator=_noise(draw), tau_delta=1 / STREAM),  # from 1 to 2, as the paper
        "Keyformer, tau 1": keyformer(budget, generator=_noise(draw), tau_delta=0.0),
        "Scissorhands": scissorhands(budget),
        "Scissorhands, drop 1": scissorhands(budget, drop=0.0),
        "SirLLM": sirllm(entropy=budget // 2, recent=budget // 2 - 4),
    }


def _noise(draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(draw)


def stream_scores(
    model: Any, tokenizer: Any, name: str, budget: int, methods: Sequence[str] | None = None, *, stop: int = STREAM,
    draws: int = 1,
) -> xr.DataArray:  # fmt: skip
    """KL from the full cache on a streamed text, means of 32 positions from 256 to `stop`, (method, draw, block) nats.

    640 tokens come 32 at a time, `budget` are held. Beyond the first draw only Keyformer has values; the rest is NaN.

    Raises:
        ValueError: a stop that is no multiple of 32 beyond 256, at most 640; an unknown method.
    """
    check.within("stream_scores", START + CHUNK, STREAM, stop=stop)
    check.divides("stream_scores", chunk=CHUNK, stop=stop)
    ids = data.text(name, start=TEXTS[name], length=STREAM, tokenizer=tokenizer)[:, :stop]
    full, chosen = stream_eval(model, ids, chunk=stop, start=START), list(methods or score_arms(budget))
    kl = torch.full((len(chosen), draws, (stop - START) // CHUNK), torch.nan)
    for row, method in enumerate(chosen):
        check.one_of("stream_scores", score_arms(budget), method=method)
        for draw in range(draws if method.startswith("Keyformer") else 1):
            logits = stream_eval(model, ids, score_arms(budget, draw)[method], CHUNK, START)
            kl[row, draw] = kl_divergence(full, logits)[0].unflatten(-1, (-1, CHUNK)).mean(-1)
    coords = {"method": chosen, "draw": range(draws), "block": range(START, stop, CHUNK)}
    out = xr.DataArray(kl.numpy(), coords, ("method", "draw", "block"), "kl")
    out.block.attrs = {"long_name": "position in the text", "units": "first of 32 tokens"}
    return out.assign_attrs(long_name="KL from the full cache, streamed", units="nats")


def probabilities(filled: Prefilled, layer: int) -> Tensor:
    """The attention matrix of one layer of a prefilled prompt, (B, H, L, L)."""
    q, k = filled.queries[layer], filled.cache.layers[layer].keys
    _, lse = attend(q, k, k, return_lse=True)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 - lse[..., None]).exp().tril()


def persistence(filled: Prefilled, *, split: int = SPLIT, thresholds: Sequence[str] = THRESHOLDS) -> xr.Dataset:
    """Persistence and its chance level by layer, means over heads: `ratio`, `chance` (threshold, layer)."""
    layers = range(len(filled.queries))
    both = torch.stack(
        [
            torch.stack([torch.stack(persistence_ratio(p, split, c)).nanmean((1, 2)) for c in thresholds])
            for p in (probabilities(filled, layer) for layer in layers)
        ]
    )  # (layer, threshold, 2)
    coords = {"threshold": list(thresholds), "layer": layers}
    names = {"ratio": "persistence", "chance": "chance level"}
    out = {
        key: xr.DataArray(both[..., i].T.numpy(), coords, ("threshold", "layer"), attrs={"long_name": text})
        for i, (key, text) in enumerate(names.items())
    }
    return xr.Dataset(out)


def memory_arms() -> dict[str, Policy | None]:
    """What answers the question about the chat: all hold 96 tokens, but for the full cache."""
    return {
        "full": None,
        "streaming": streaming(HELD),
        "H2O": h2o(HELD // 2, HELD // 2),
        "SirLLM": sirllm(entropy=HELD - 20, recent=16),
    }


def memory(model: Any, tokenizer: Any, seed: int, methods: Sequence[str] | None = None) -> xr.DataArray:
    """The answer's NLL after 400 tokens of small talk, (method,) nats per digit."""
    chat = long_memory(tokenizer, generator=torch.Generator().manual_seed(seed))
    arms = memory_arms()
    values = [float(ask_memory(model, chat, arms[method], chunk=CHUNK).mean()) for method in methods or arms]
    nll = xr.DataArray(values, {"method": list(methods or arms)}, ("method",), "memory")
    return nll.assign_attrs(long_name="answer's negative log-likelihood", units="nats per digit")


@torch.no_grad()
def fading(
    model: Any, tokenizer: Any, seed: int, *, decay: float, chunks: Sequence[int] = (2, 4, 6, 8, 10, 12)
) -> xr.DataArray:
    """The answer's NLL under SirLLM after each number of chunks of small talk, (gap,) nats per digit."""
    chat = long_memory(tokenizer, talk=CHUNK * max(chunks), generator=torch.Generator().manual_seed(seed))
    cache = PolicyCache(model.config, sirllm(entropy=HELD - 20, recent=16, decay=decay))
    continue_with(model, cache, chat.facts, keep=1)
    rest, values = torch.cat((chat.question, chat.digits[:, :-1]), 1), []
    for number, part in enumerate(chat.talk.split(CHUNK, 1), 1):
        continue_with(model, cache, part, keep=1)
        if number in chunks:
            logits = continue_with(model, cache.fork(), rest)[:, -chat.digits.shape[1] :]
            values.append(float(-logits.log_softmax(-1).gather(-1, chat.digits[..., None]).mean()))
    nll = xr.DataArray(values, {"gap": list(chunks)}, ("gap",), "fading")
    nll.gap.attrs = {"long_name": "small talk since the fact", "units": "chunks of 32 tokens"}
    return nll.assign_attrs(long_name="answer's negative log-likelihood", units="nats per digit")
