"""The experiments behind the notebook on shared contexts and `datasets/kv_shared_context`: one function for each column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import xarray as xr

from memlens import check
from memlens.kv.adapter import PolicyCache
from memlens.kv.kivi import kivi
from memlens.kv.policies import Policy, full, h2o, sirllm, snapkv, streaming
from memlens.kv.retrieval import instinfer, shadowkv
from memlens.models.hooks import rotary_frequencies
from memlens.tasks.shared_context import (
    GENERATORS,
    MODES,
    Encoded,
    Item,
    Method,
    Reading,
    begin,
    evaluate_shared,
    read,
)  # fmt: skip

__all__ = [
    "EVICTING", "LINEAR", "SEEDS", "TASKS", "arms", "asked_lines", "draw", "evaluate", "fresh_prompt", "kept_lines", "later", "losses",
    "paired_sign", "selections",
]  # fmt: skip

SHARE, WINDOW, SINKS, RECENT = 0.4, 32, 4, 16  # of the context that an eviction leaves; of SnapKV; of SirLLM
SEEDS, TASKS = range(6), tuple(name for name in GENERATORS if name != "codes")
EVICTING, LINEAR = ("SnapKV", "H2O", "streaming", "SirLLM"), ("KIVI-4", "SparF")  # memory below, and of, O(n)


def selections(share: float = SHARE, window: int = WINDOW) -> dict[str, Callable[[int], Policy]]:
    """The evicting methods by the tokens that they compress: once, to a share of them; later tokens all stay.

    `window` is SnapKV's: the newest rows that vote.
    """

    def room(length: int) -> int:
        return max(window + 1, round(share * length))

    return {
        "SnapKV": lambda length: snapkv(room(length), window=window, kernel=5, pool="avg"),
        "H2O": lambda length: h2o(room(length) // 2, room(length) - room(length) // 2)._replace(when="prompt"),
        "streaming": lambda length: streaming(room(length), sinks=SINKS)._replace(when="prompt"),
        "SirLLM": lambda length: sirllm(entropy=room(length) - SINKS - RECENT, recent=RECENT)._replace(when="prompt"),
    }


def arms(model: Any) -> dict[str, Method]:
    """All methods by name, the full cache first."""
    formats = {
        "KIVI-4": kivi(4, group=32, residual=32),
        "KIVI-2": kivi(2, group=32, residual=32),
        "SparF": instinfer(16, 1 / 8),
        "ShadowKV": shadowkv(rotary_frequencies(model), rank=30, budget=128, outliers=6),
    }
    table = {"full": lambda length: full()}
    table |= {name: partial(_stored, store=store) for name, store in formats.items()} | selections()
    return {name: Method(name, policy) for name, policy in table.items()}


def _stored(length: int, store: Any) -> Policy:
    return full().stored(store)


def draw(tokenizer: Any, task: str, seed: int, **options: Any) -> Item:
    """The item of a task and seed; options as its generator takes them."""
    check.one_of("draw", GENERATORS, task=task)
    return GENERATORS[task](tokenizer, generator=torch.Generator().manual_seed(seed), **options)


def evaluate(
    model: Any, item: Encoded, methods: Sequence[str], modes: Iterable[str] = MODES, *, reading: Reading | None = None
) -> xr.Dataset:
    """`evaluate_shared` of several methods, on one prefill: variables (method, task, mode, turn)."""
    table, reading = arms(model), reading or read(model, item)
    for method in methods:
        check.one_of("evaluate", table, method=method)
    return xr.concat(
        [
            xr.concat([evaluate_shared(model, table[name], item, mode, reading=reading) for name in methods], "method")
            for mode in modes
        ],
        "mode",
    )


@torch.no_grad()
def fresh_prompt(model: Any, item: Encoded) -> xr.DataArray:
    """The answers' negative log-likelihood (turn,), nats per token, when each question is a prompt of its own, no cache."""
    values = []
    for asked, answer in item.multi_turns:
        logits = model(torch.cat((item.context, asked, answer[:, :-1]), 1), use_cache=False).logits[:, -answer.shape[1] :]
        values.append(float(-logits.log_softmax(-1).gather(-1, answer[..., None]).mean()))
    return xr.DataArray(values, {"turn": range(1, len(values) + 1)}, ("turn",), "nll")


# --- what the verdicts are over ------------------------------------------------------------------------------------


def losses(right: xr.DataArray) -> xr.DataArray:
    """What a method gets wrong that the full cache gets right, on the same questions: full - method."""
    lost = right.sel({"method": "full"}, drop=True) - right.drop_sel({"method": "full"})
    return lost.rename("loss").assign_attrs(long_name="accuracy lost to the full cache", units="")


def later(values: xr.DataArray) -> xr.DataArray:
    """Mean over the turns after the first."""
    return values.sel(turn=slice(2, None)).mean("turn")


def paired_sign(more: xr.DataArray, less: xr.DataArray) -> xr.DataArray:
    """Share of contexts where `more` is the larger, less the share where it is the smaller; in [-1, 1]."""
    gap = more - less
    return xr.where(abs(gap) < 1e-9, 0.0, gap / abs(gap).where(gap != 0, 1.0)).mean("context")


# --- which lines are left ------------------------------------------------------------------------------------------


@torch.no_grad()
def kept_lines(
    model: Any, item: Encoded, mode: str, reading: Reading, share: float = SHARE, window: int = WINDOW,
    methods: Sequence[str] = ("SnapKV", "H2O"),
) -> xr.DataArray:  # fmt: skip
    """How much of each line of the context an eviction left, (method, line), mean over layers and kv heads, in [0, 1]."""
    table, rows = selections(share, window), []
    for name in methods:
        cache = begin(model, Method(name, table[name]), item, mode, reading)[1]
        rows.append(_by_line(cache, item).numpy())
    out = xr.DataArray(rows, {"method": list(methods), "line": range(1, len(rows[0]) + 1)}, ("method", "line"), "kept")
    out.line.attrs["long_name"] = "line of the context"
    return out.assign_attrs(long_name="share of the line that is kept", units="")


def _by_line(cache: PolicyCache, item: Encoded) -> torch.Tensor:
    ends = item.context[0] == item.close[0, -1]
    line = ends.cumsum(0) - ends.long()
    held = torch.zeros(line.shape[0])
    for layer in range(len(cache.layers)):
        pos = cache.positions(layer)[0]
        found = torch.bincount(pos.flatten().long(), minlength=len(held))[: len(held)]
        held += found / (len(pos) * len(cache.layers))
    size = torch.bincount(line)
    return torch.zeros(len(size)).index_add(0, line, held) / size


def asked_lines(item: Encoded) -> list[int]:
    """The line of the context, from 1, that answers each turn."""
    ends = item.context[0] == item.close[0, -1]
    found = []
    for _, answer in item.multi_turns:
        spans = item.context[0].unfold(0, answer.shape[1], 1)
        place = int((spans == answer).all(-1).nonzero()[0])
        found.append(int(ends[:place].sum()) + 1)
    return found
