"""Attention of several requests that begin with the same tokens, with one copy of those tokens' keys and values.

    out = merge(attend(all queries stacked, prefix), attend(each request's queries, its own keys))

The queries of the whole group meet the prefix in one pass, as rows of one matrix, so it is read once and not once for each
request; the two parts are disjoint sets of keys and join by their lse. Source: arXiv:2412.03594, section 5.
"""

from __future__ import annotations

from torch import Tensor

from memlens import check
from memlens.attention.exact import attend
from memlens.attention.merge import Attended, merge

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
        form: as `memlens.attention.attend`.
    Raises:
        ValueError: shapes that disagree, or kv heads that do not divide the heads.
        TypeError: a mask that is not bool.
    """
    sizes = check.shapes(
        "prefix_attend", q_group=(q_group, "requests heads n dim"), k_pre=(k_pre, "kv_heads prefix dim"),
        v_pre=(v_pre, "kv_heads prefix value_dim"), k_own=(k_own, "requests kv_heads own dim"),
        v_own=(v_own, "requests kv_heads own value_dim"), own_mask=(own_mask, "requests own"),
    )  # fmt: skip
    check.at_least("prefix_attend", 1, requests=sizes["requests"])
    requests, heads, n = q_group.shape[:3]
    stacked = q_group.transpose(0, 1).reshape(1, heads, requests * n, q_group.shape[-1])
    out, lse = attend(stacked, k_pre[None], v_pre[None], causal=False, scale=scale, return_lse=True, form=form)
    out = out.reshape(heads, requests, n, -1).transpose(0, 1)
    lse = lse.reshape(heads, requests, n).transpose(0, 1)
    mask = None if own_mask is None else own_mask[:, None, None, :]
    own = attend(q_group, k_own, v_own, mask=mask, scale=scale, return_lse=True, form=form)
    both = merge(out, lse, *own)
    return both if return_lse else both.out
