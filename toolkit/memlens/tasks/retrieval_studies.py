"""The experiments behind the notebook on retrieval, and `datasets/kv_retrieval`: one function for each column."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from memlens.attention.exact import attend
from memlens.attention.retrieval import ShadowState, chosen_chunks, shadow_build, sparf
from memlens.attention.rope import rope, unrope
from memlens.cost.storage import flash_pages
from memlens.kv.policies import Policy, full
from memlens.kv.retrieval import instinfer, shadowkv
from memlens.kv.select import chunk_landmarks, topk_keep
from memlens.models.hooks import QKV, rotary_frequencies
from memlens.tasks.quantised_studies import PROMPT, TEXTS, copy_nll, passage
from memlens.tasks.thin_studies import energies, from_prefill, rank_arms

__all__ = [
    "TEXTS", "arms", "chunk_guess", "copy_nll", "coverage", "energies", "from_prefill", "passage", "rank_arms",
    "shadow_state", "sparf_errors",
]  # fmt: skip

CHUNK, SHARE, RANK, ROWS = 8, 0.1, 30, 16
TOKENS, CHANNELS, PAGE = 1 / 8, (8, 16, 32), 16


def arms(model: Any) -> dict[str, Policy]:
    """ShadowKV at several sparse budgets (shares of the prompt, six outliers), and SparF at an eighth of the tokens."""
    table = {"full": full()}
    for share in (0.125, 0.25, 0.5):
        table[f"ShadowKV {share}"] = full().stored(
            shadowkv(rotary_frequencies(model), rank=RANK, budget=int(share * PROMPT), outliers=6)
        )
    for r in CHANNELS:
        table[f"SparF r={r}"] = full().stored(instinfer(r, TOKENS))
    return table


def shadow_state(x: QKV, frequency: Tensor, *, outliers: float = SHARE) -> ShadowState:
    """ShadowKV's state of one layer of a prompt; `outliers` and what a step fetches, a tenth, are shares of the chunks."""
    chunks = x.k.shape[2] // CHUNK
    turns = {"rotate": partial(rope, inv_freq=frequency), "unrotate": partial(unrope, inv_freq=frequency)}
    plan = {"rank": RANK, "budget": CHUNK * round(SHARE * chunks), "chunk": CHUNK, "outliers": round(outliers * chunks)}
    return shadow_build(x.k, x.v, **plan, local=0, **turns)


@torch.no_grad()
def coverage(qkv: dict[int, QKV], frequency: Tensor) -> xr.Dataset:
    """What the chunks that a step sees cover of its attention to the prompt, by layer, mean over 16 queries and the heads.

    `mass` (layer, way): a tenth of the chunks by their landmarks; the same and a tenth of outliers; as many in all by
    landmarks alone; and the most that a tenth can cover. `first` (layer): share of heads whose outliers hold chunk 0.
    """
    ways, rows, first = ["landmarks 10 %", "and outliers 10 %", "landmarks 20 %", "best 10 %"], [], []
    for x in qkv.values():
        prompt = QKV(x.q, x.k[:, :, :-ROWS], x.v[:, :, :-ROWS])
        q = x.q[:, :, -ROWS:]
        mass = _chunk_mass(q, prompt.k)
        tenth, odd = (shadow_state(prompt, frequency, outliers=share) for share in (0.0, SHARE))
        states = [tenth, odd, tenth._replace(budget=2 * tenth.budget)]
        count = states[0].budget // CHUNK
        rows.append([*(_covered(q, state, mass) for state in states), float(mass.topk(count, -1).values.sum(-1).mean())])
        first.append(float((states[1].outliers == 0).any(-1).float().mean()))
    layers = range(len(rows))
    data = xr.Dataset({"mass": (("layer", "way"), rows), "first": ("layer", first)}, {"layer": layers, "way": ways})
    data.mass.attrs = {"long_name": "attention covered", "units": ""}
    return data


def _chunk_mass(q: Tensor, k: Tensor) -> Tensor:
    """Attention of each query to each chunk, mean over the query heads of a kv head: (B, Hkv, n, C)."""
    score = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT * q.shape[-1] ** -0.5
    return score.softmax(-1).unflatten(-1, (-1, CHUNK)).sum(-1).mean(2)


def _covered(q: Tensor, state: ShadowState, mass: Tensor) -> float:
    steps = [chosen_chunks(q[:, :, i : i + 1], state) for i in range(q.shape[2])]
    seen = torch.cat((torch.stack(steps, 2), state.outliers.long()[:, :, None].expand(-1, -1, q.shape[2], -1)), -1)
    return float(mass.gather(-1, seen).sum(-1).mean())


@torch.no_grad()
def chunk_guess(x: QKV, head: int) -> xr.Dataset:
    """`share` (of, place): the newest query's attention to each chunk, and what its landmarks make of it; one query head."""
    kv_head = head // (x.q.shape[1] // x.k.shape[1])
    q, k = x.q[:, head : head + 1, -1:], x.k[:, kv_head : kv_head + 1]
    guess = (q @ chunk_landmarks(k, CHUNK).mT * q.shape[-1] ** -0.5).softmax(-1)
    rows = torch.stack((_chunk_mass(q, k)[0, 0, 0], guess[0, 0, 0]))
    of = ["attention", "landmarks"]
    array = xr.DataArray(rows.numpy(), {"of": of, "place": range(rows.shape[1])}, ("of", "place"), "share")
    array.place.attrs["long_name"] = f"chunk of {CHUNK} tokens"
    return array.assign_attrs(long_name="share", units="").to_dataset()


@torch.no_grad()
def sparf_errors(qkv: dict[int, QKV], channels: Iterable[int] = CHANNELS, positions: Iterable[int] = (511,)) -> xr.Dataset:
    """`error` (way, layer, head, position), relative error of one query's output when an eighth of the tokens is fetched.

    Besides SparF: the same tokens without the mean value, the best tokens by exact scores, and the newest ones.
    `pages` (layer, head, position): share of pages of 16 tokens that hold a token fetched by SparF with a quarter of the
    channels.
    """
    channels, positions = list(channels), list(positions)
    found, pages = {}, []
    for x in qkv.values():
        for position in positions:
            q, k, v = x.q[:, :, position : position + 1], x.k[:, :, : position + 1], x.v[:, :, : position + 1]
            for way, (out, j) in _fetches(q, k, v, channels).items():
                want = attend(q, k, v)
                found.setdefault(way, []).append(((out - want).norm(dim=-1) / want.norm(dim=-1))[0, :, 0])
                if way == f"SparF r={q.shape[-1] // 4}":
                    pages.append(flash_pages(j, PAGE)[0, :, 0] / -(-k.shape[2] // PAGE))
    shape = (len(qkv), len(positions), -1)
    error = torch.stack([torch.stack(rows).view(shape) for rows in found.values()])
    coords = {"way": list(found), "layer": list(qkv), "position": positions, "head": range(error.shape[-1])}
    data = xr.Dataset({"error": (("way", "layer", "position", "head"), error.numpy())}, coords)
    data["pages"] = ("layer", "position", "head"), torch.stack(pages).view(shape).numpy()
    data.error.attrs = {"long_name": "relative error of the output", "units": ""}
    return data


def _fetches(q: Tensor, k: Tensor, v: Tensor, channels: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    topk = max(1, round(TOKENS * k.shape[2]))
    found = {f"SparF r={r}": sparf(q, k, v, r, topk)[::2] for r in channels}
    quarter = sparf(q, k, v, q.shape[-1] // 4, topk).j
    score = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)
    newest = torch.arange(k.shape[2] - topk, k.shape[2]).expand_as(quarter)
    for way, j in {"no mean value": quarter, "exact scores": topk_keep(score, topk), "newest": newest}.items():
        mask = torch.zeros(score.shape, dtype=torch.bool).scatter_(-1, j, True)
        found[way] = attend(q, k, v, causal=False, mask=mask), j
    return found
