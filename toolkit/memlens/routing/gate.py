"""The router's formulas: pick k experts for each token, sum what they say, and press for an equal load."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens import check

__all__ = ["Gate", "load_balance", "mix_experts", "top_experts", "topk_gate"]


class Gate(NamedTuple):
    weight: Tensor  # (..., k), dtype of the logits
    index: Tensor  # (..., k) int64, by falling weight; ties go to the lower expert


def top_experts(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the k largest scores (..., expert), largest first; ties go to the lower index.

    Raises:
        ValueError: k outside 1..expert, or a score that is NaN.
    """
    check.within("top_experts", 1, scores.shape[-1], k=k)
    if bool(scores.isnan().any()):
        check.fail("top_experts", "scores hold NaN", "numbers", "look at what produced the logits")
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def topk_gate(logits: Tensor, k: int, *, renormalize: bool = True) -> Gate:
    """The k experts of each token and the weights their outputs are summed with.

    weight = softmax(logits)[index], divided by its sum over the k chosen where `renormalize` holds. With k=1 a
    renormalized weight is always 1 and the router gets no gradient from the task: pass False there.

    Args:
        logits: (..., expert) raw router scores; the softmax runs in float32 at least.
        k: experts for each token.
    Raises:
        ValueError: k outside 1..expert, NaN scores.
    Source: arXiv:2401.04088, section 2.1 (renormalized); arXiv:2101.03961, equation 2 (raw, k=1).
    """
    index = top_experts(logits.detach(), k)
    wide = torch.promote_types(logits.dtype, torch.float32)
    weight = F.softmax(logits, dim=-1, dtype=wide).gather(-1, index)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
    return Gate(weight.to(logits.dtype), index)


def load_balance(prob: Tensor, index: Tensor) -> Tensor:
    """The auxiliary loss E * sum_e f_e p_e, a scalar: 1 for an equal load, up to E when all goes to one expert.

    f_e is the share of routed slots that expert e received, p_e the mean probability the router gave it. Only p
    carries a gradient.

    Args:
        prob: (..., expert), softmax of the router's logits.
        index: (..., k), the experts chosen; the same leading axes as `prob`.
    Raises:
        ValueError: leading axes that disagree, or an index outside 0..expert-1.
    Source: arXiv:2101.03961, equations 4 to 6, with the slots of all k choices counted.
    """
    experts = prob.shape[-1]
    if prob.shape[:-1] != index.shape[:-1]:
        check.fail("load_balance", f"prob {tuple(prob.shape)} and index {tuple(index.shape)}", "the same leading axes")
    check.within("load_balance", 0, experts - 1, index=index)
    share = torch.bincount(index.flatten(), minlength=experts).to(prob.dtype) / max(1, index.numel())
    return experts * (share * prob.flatten(0, -2).mean(0)).sum()


def mix_experts(x: Tensor, gate: Gate, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """sum_j weight_j * down_e(silu(gate_e x) * up_e x) over each token's experts e = index_j, (tokens, dim).

    Tokens are sorted by expert, so that each expert runs once on its own rows and nothing is padded or dropped.

    Args:
        x: (tokens, dim).
        gate: weight and index, (tokens, k).
        w_gate, w_up: (expert, hidden, dim); w_down: (expert, dim, hidden).
    Raises:
        ValueError: sizes that disagree, or an index outside 0..expert-1.
    """
    sizes = check.shapes(
        "mix_experts", x=(x, "tokens dim"), weight=(gate.weight, "tokens k"), index=(gate.index, "tokens k"),
        w_gate=(w_gate, "expert hidden dim"), w_up=(w_up, "expert hidden dim"), w_down=(w_down, "expert dim hidden"),
    )  # fmt: skip
    check.within("mix_experts", 0, sizes["expert"] - 1, index=gate.index)
    slots = gate.index.flatten()
    order = slots.argsort(stable=True)
    token = order // sizes["k"]
    parts = []
    for expert, rows in enumerate(x[token].split(torch.bincount(slots, minlength=sizes["expert"]).tolist())):
        hidden = F.silu(rows @ w_gate[expert].T) * (rows @ w_up[expert].T)
        parts.append(hidden @ w_down[expert].T)
    out = torch.cat(parts) * gate.weight.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, out)
