"""Attention of several requests that begin with the same tokens, with one copy of those tokens' keys and values.

    out = merge(attend(all queries stacked, prefix), attend(each request's queries, its own keys))

The queries of the whole group meet the prefix in one pass, as rows of one matrix, so it is read once and not once for each
request; the two parts are disjoint sets of keys and join by their lse. Source: arXiv:2412.03594, section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention.exact import KERNEL_DIM, attend
from memlens.attention.merge import Attended, merge, merge_many

__all__ = ["prefix_attend"]


def prefix_attend(
    q_group: Tensor, k_pre: Tensor, v_pre: Tensor, k_own: Tensor, v_own: Tensor, *, own_mask: Tensor | None = None,
    scale: float | None = None, return_lse: bool = False, form: str = "auto",
) -> Tensor | Attended:  # fmt: skip
    """Softmax attention over [prefix, own keys] for each request: out (R,H,n,Dv) in q's dtype.

    Args:
        q_group: (R, H, n, D), the newest n tokens of R requests.
        k_pre, v_pre: (Hkv, P, D) and (Hkv, P, Dv), held once; every query sees all of them.
        k_own, v_own: (R, Hkv, T, D) and (R, Hkv, T, Dv); the queries are the last n of these tokens, causally.
        own_mask: (R, T) bool, False for padding among the own keys (requests of unequal length, padded on the left).
        scale: of the scores, default D ** -0.5.
        return_lse: return `Attended(out, lse)`, lse (R,H,n) float32, natural log.
        form: as `memlens.attention.attend`. "triton" takes one launch for both parts where a kv head has at most 64 rows
            and no gradient is wanted (decoding), and `attend`'s kernel for each part otherwise.
    Raises:
        ValueError: shapes that disagree, or kv heads that do not divide the heads.
        RuntimeError: form="triton" where it cannot run, saying why.
        TypeError: a mask that is not bool.
    """
    sizes = check.shapes(
        "prefix_attend", q_group=(q_group, "requests heads n dim"), k_pre=(k_pre, "kv_heads prefix dim"),
        v_pre=(v_pre, "kv_heads prefix value_dim"), k_own=(k_own, "requests kv_heads own dim"),
        v_own=(v_own, "requests kv_heads own value_dim"), own_mask=(own_mask, "requests own"),
    )  # fmt: skip
    check.at_least("prefix_attend", 1, requests=sizes["requests"])
    fits = max(q_group.shape[-1], v_pre.shape[-1]) <= KERNEL_DIM
    form = backend.choose("prefix_attend", form, q_group, k_pre, v_pre, k_own, v_own, kernel=fits or form == "triton")
    if form == "triton" and _one_launch(q_group, k_pre, v_pre, k_own, v_own):
        both = _fused(q_group, k_pre, v_pre, k_own, v_own, own_mask, scale)
        return both if return_lse else both.out
    requests, heads, n = q_group.shape[:3]
    stacked = q_group.transpose(0, 1).reshape(1, heads, requests * n, q_group.shape[-1])
    out, lse = attend(stacked, k_pre[None], v_pre[None], causal=False, scale=scale, return_lse=True, form=form)
    out = out.reshape(heads, requests, n, -1).transpose(0, 1)
    lse = lse.reshape(heads, requests, n).transpose(0, 1)
    mask = None if own_mask is None else own_mask[:, None, None, :]
    own = attend(q_group, k_own, v_own, mask=mask, scale=scale, return_lse=True, form=form)
    both = merge(out, lse, *own)
    return both if return_lse else both.out


def _one_launch(q: Tensor, *keys_and_values: Tensor) -> bool:
    """Whether the kernel that decodes prefix and own keys side by side takes these."""
    rows, dims = q.shape[1] // keys_and_values[0].shape[0] * q.shape[2], [x.shape[-1] for x in (q, *keys_and_values)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *keys_and_values))
    return 0 < rows <= 64 and max(dims) <= 256 and not learns


def _fused(q, k_pre, v_pre, k_own, v_own, own_mask: Tensor | None, scale: float | None) -> Attended:
    from memlens_kernels.prefix import prefix_parts

    (requests, heads, fresh, dim), kv_heads = q.shape, k_pre.shape[0]
    if own_mask is not None and own_mask.dtype != torch.bool:
        check.fail("prefix_attend", f"a mask of {own_mask.dtype}", "torch.bool, True = may attend", error=TypeError)
    check.divides("prefix_attend", kv_heads=kv_heads, heads=heads)
    check.same_dtype("prefix_attend", q_group=q, k_pre=k_pre, v_pre=v_pre, k_own=k_own, v_own=v_own)
    check.at_least("prefix_attend", fresh, "the queries are the last of these tokens", own=k_own.shape[2])
    rows = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, requests, -1, dim).contiguous()
    alive = None if own_mask is None else own_mask.contiguous()
    scale = dim**-0.5 if scale is None else scale
    outs, lses = prefix_parts(rows, k_pre, v_pre, k_own, v_own, fresh=fresh, alive=alive, scale=scale)
    out, lse = merge_many(list(zip(outs, lses, strict=True)))
    return Attended(*(x.transpose(0, 1).reshape(requests, heads, fresh, *x.shape[3:]) for x in (out, lse)))
