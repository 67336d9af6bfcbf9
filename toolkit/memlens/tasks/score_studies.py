"""The experiments behind the notebook on eviction scores and `datasets/kv_scores`: one function for each column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from memlens import data
from memlens.attention.exact import attend
from memlens.kv.adapter import PolicyCache
from memlens.kv.cache import Prefilled, continue_with, stream_eval
from memlens.kv.policies import Policy, h2o, keyformer, scissorhands, sirllm, streaming
from memlens.kv.score import persistence_ratio
from memlens.tasks.cache_probes import kl_divergence
from memlens.tasks.cache_studies import CHUNK, STREAM, TEXTS
from memlens.tasks.long_memory import ask_memory, long_memory

__all__ = ["BUDGETS", "SEEDS", "fading", "memory", "persistence", "probabilities", "score_arms", "stream_scores"]

BUDGETS, START = (128,), 256  # tokens held of 640; the first position that is compared
DRAWS, SEEDS = 2, (0, 1, 2, 3, 4)  # noise per text, chats
SPLIT, THRESHOLDS = 271, ("1/t", "10/t")  # of 543 tokens, as half of them
HELD = 96  # in the chat


def score_arms(budget: int) -> dict[str, Policy]:
    """The policies side by side, all with `budget` tokens; one that draws noise draws for each row of a batch."""
    noise = torch.Generator().manual_seed(budget)
    return {
        "streaming": streaming(budget),
        "H2O": h2o(budget // 2, budget - budget // 2),
        "Keyformer": keyformer(budget, generator=noise, tau_delta=1 / STREAM),  # from 1 to 2, as the paper
        "Keyformer, tau 1": keyformer(budget, generator=noise, tau_delta=0.0),
        "Scissorhands": scissorhands(budget),
        "Scissorhands, drop 1": scissorhands(budget, drop=0.0),
        "SirLLM": sirllm(entropy=budget // 2, recent=budget // 2 - 4),
    }


def draws(method: str) -> int:
    """How many independent runs an arm needs for its spread."""
    return DRAWS if method == "Keyformer" else 1


def stream_scores(model: Any, tokenizer: Any, name: str, budget: int, methods: Sequence[str] | None = None) -> xr.DataArray:
    """KL from the full cache on 640 streamed tokens, mean from position 256 on, (method, draw) nats; NaN beyond the draws."""
    ids = data.text(name, start=TEXTS[name], length=STREAM, tokenizer=tokenizer)
    full = stream_eval(model, ids, chunk=STREAM, start=START)
    arms, rows = score_arms(budget), []
    for method in methods or arms:
        count = draws(method)
        logits = stream_eval(model, ids.expand(count, -1), arms[method], CHUNK, START)
        mean = torch.stack([kl_divergence(full[0], one).mean() for one in logits])
        rows.append(torch.nn.functional.pad(mean, (0, DRAWS - count), value=torch.nan))
    coords = {"method": list(methods or arms), "draw": range(DRAWS)}
    kl = xr.DataArray(torch.stack(rows).numpy(), coords, ("method", "draw"), "kl")
    return kl.assign_attrs(long_name="KL from the full cache, streamed", units="nats")


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
