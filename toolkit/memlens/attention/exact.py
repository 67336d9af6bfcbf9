"""Exact softmax attention that never stores the (q_len, k_len) matrix, with the log-denominator beside the output.

    s_ij = scale · q_i·k_j + bias_ij      lse_i = log Σ_j exp(s_ij)      out_i = Σ_j exp(s_ij - lse_i) v_j

over the keys j that query i may see. `lse` is what `memlens.attention.merge` needs to join partial results.
Source: arXiv:2205.14135 (FlashAttention); the fast forms use the loop order of arXiv:2307.08691.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention import fused, tiled
from memlens.attention.call import Call, differentiable, visible
from memlens.attention.io import attention_io
from memlens.attention.merge import Attended

__all__ = ["Attended", "attend", "attention_io"]

KERNEL_DIM = 256  # the kernels take dim and value_dim up to here


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, bias: Tensor | None = None,
    scale: float | None = None, q_offset: int | None = None, return_lse: bool = False, form: str = "auto",
) -> Tensor | Attended:  # fmt: skip
    """Softmax attention: out (B,H,Tq,Dv) in q's dtype, or `Attended(out, lse)` with `return_lse`.

    A row that may attend to nothing gives out = 0, lse = -inf and gradient 0, never NaN. Softmax and sums are float32
    (float64 for float64 inputs). Gradients flow from out and lse into q, k, v and bias.

    Args:
        q: (B, H, Tq, D).
        k, v: (B, Hkv, Tk, D) and (B, Hkv, Tk, Dv); Hkv divides H, query head h reads kv head h // (H / Hkv).
        causal: key j is visible to query i only if j <= q_offset + i.
        mask: bool, broadcastable to (B, H, Tq, Tk); True = may attend. Holds besides `causal`.
        bias: float, broadcastable likewise, added to the scaled scores; -inf hides a pair.
        scale: of the scores, default D ** -0.5.
        q_offset: position of the first query; default Tk - Tq, which lines the last query up with the last key.
        return_lse: also return lse (B, H, Tq), natural log.
        form: "reference" (row by row), "torch" (tiles, or torch's fused CPU operator), "triton" (the kernel; takes
            no bias and no dim over 256), "auto". What auto picks: `memlens.backend.explain("attend", q, k, v)`, with
            `kernel=False` for what the kernel does not take.
    Raises:
        ValueError: shapes that disagree, kv heads that do not divide the heads, a mask or bias that does not
            broadcast, or form="triton" with a bias or a dim over 256.
        TypeError: an integer mask or bias.
        RuntimeError: form="triton" where it cannot run, saying why.
    """
    sizes = _check(q, k, v, mask, bias)
    offset = sizes["k_len"] - sizes["q_len"] if q_offset is None else int(q_offset)
    call = Call(q.shape[-1] ** -0.5 if scale is None else float(scale), bool(causal), offset, _four(mask))
    result = _FORMS[_choose(form, q, k, v, bias)](q, k, v, _four(bias), call)
    return result if return_lse else result.out


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> dict[str, int]:
    sizes = check.shapes(
        "attend", q=(q, "batch heads q_len dim"), k=(k, "batch kv_heads k_len dim"), v=(v, "batch kv_heads k_len value_dim")
    )
    check.divides("attend", kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    check.same_dtype("attend", q=q, k=k, v=v)
    check.layout("attend", sizes["heads"], sizes["q_len"])
    check.at_least("attend", 1, **{axis: sizes[axis] for axis in ("batch", "heads", "dim", "value_dim")})
    if not q.is_floating_point():
        check.fail("attend", f"q is {q.dtype}", "a floating dtype", error=TypeError)
    scores = (sizes["batch"], sizes["heads"], sizes["q_len"], sizes["k_len"])
    if mask is not None and mask.dtype != torch.bool:
        fix = "compare it, e.g. mask != 0; numbers to add to the scores go in bias"
        check.fail("attend", f"mask is {mask.dtype}", "a bool mask, True = may attend", fix, error=TypeError)
    if bias is not None and not bias.is_floating_point():
        check.fail("attend", f"bias is {bias.dtype}", "a floating dtype", "a bool belongs in mask", error=TypeError)
    for name, x in (("mask", mask), ("bias", bias)):
        if x is not None and not _broadcasts(x.shape, scores):
            check.fail("attend", f"{name} has shape {tuple(x.shape)}", f"one that broadcasts to (B, H, Tq, Tk) = {scores}")
    return sizes


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(target), strict=False)
    )


def _four(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)


def _choose(form: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str:
    if form == "triton" and bias is not None:
        check.fail("attend", "a bias with form='triton'", "a bool mask or none", "use form='torch' or 'auto' with a bias")
    fits = form == "triton" or (bias is None and max(q.shape[-1], v.shape[-1]) <= KERNEL_DIM)
    return backend.choose("attend", form, q, k, v, kernel=fits)


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> Attended:
    """The definition, one query row at a time (all batches and heads of the row together)."""
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    query = q.to(wide).unflatten(1, (k.shape[1], -1))  # (B, Hkv, group, Tq, D)
    key, value = k.to(wide), v.to(wide)
    added = None if bias is None else bias.to(wide).expand(batch, heads, q_len, k_len)
    outs, lses = [], []
    for i in range(q_len):
        scores = call.scale * torch.einsum("bgrd,bgjd->bgrj", query[:, :, :, i], key).flatten(1, 2)  # (B, H, Tk)
        if added is not None:
            scores = scores + added[:, :, i]
        seen = visible(call, slice(i, i + 1), slice(0, k_len), q.device)
        if seen is not None:
            scores = scores.masked_fill(~seen.expand(batch, heads, 1, k_len)[:, :, 0], -torch.inf)
        top = scores.detach().amax(-1) if k_len else scores.new_full((batch, heads), -torch.inf)
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = (scores - top[..., None]).exp()
        total = weights.sum(-1)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        share = (weights / total[..., None]).unflatten(1, query.shape[1:3])  # the attention probabilities of row i
        outs.append(torch.einsum("bgrj,bgjd->bgrd", share, value).flatten(1, 2))
        lses.append((top + total.log()).masked_fill(empty, -torch.inf))
    if not outs:
        return Attended(q.new_zeros((batch, heads, 0, v.shape[-1])), q.new_zeros((batch, heads, 0), dtype=wide))
    return Attended(torch.stack(outs, 2).to(q.dtype), torch.stack(lses, 2))


def _torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> Attended:
    """torch's fused CPU operator where it serves, else tiles; both keep memory linear in the length."""
    wants_bias_grad = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    module = fused if fused.serves(q, k, v) else tiled
    return differentiable(module.forward, (tiled if wants_bias_grad else module).backward, q, k, v, bias, call)


def _triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> Attended:
    from memlens.attention import kernel

    return kernel.run(q, k, v, call)


_FORMS = {"reference": _reference, "torch": _torch, "triton": _triton}
