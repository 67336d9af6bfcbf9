"""What a cached token is worth: column statistics of the attention matrix, without storing that matrix.

    P_ij = exp(scale · q_i·k_j - lse_i)       for the keys j that row i may see, else 0
    column_mass_j = Σ_i P_ij                  (or the mean, the largest, the last, the count above or below a threshold)

Scores are per kv head, (B, Hkv, L): higher is kept. They are statistics for a selection, so no gradient flows through them.
Source: arXiv:2306.14048 (the accumulated sum, H2O), arXiv:2404.14469 (the window of last rows and the smoothing, SnapKV),
arXiv:2403.09054 (noise and temperature, Keyformer), arXiv:2305.17118 (persistence, Scissorhands).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens import backend, check

__all__ = [
    "Persistence", "column_mass", "group_heads", "gumbel_mass", "hit_rate", "persistence_ratio", "retained_mass",
    "retaining_scores", "smooth", "surprisal",
]  # fmt: skip

REDUCES = ("sum", "mean", "max", "last", "count_above", "count_below")
GROUPS = ("mean", "max", "sum", "none")
LOG2E = 1.4426950408889634
TILE = 1 << 21  # probabilities held at a time by the torch form; a row is never split


class Mass(NamedTuple):
    """One call of `column_mass` after its checks, as each form receives it."""

    q: Tensor  # (B, H, Lq, D)
    k: Tensor  # (B, Hkv, L, D)
    lse: Tensor | None  # (B, H, Lq), float32
    alive: Tensor | None  # (B, Hkv, L), bool
    limit: Tensor | None  # (B, Hkv, Lq), float32: the threshold of each row, for the counts
    q_start: int
    scale: float
    reduce: str  # sum | max | count_above | count_below
    noise: Tensor | None = None  # (B, H, Lq, L), added to the scores; only without lse
    tau: Tensor | None = None  # (Lq,): the temperature of each row; likewise


@torch.no_grad()
def column_mass(
    q: Tensor, k: Tensor, *, lse: Tensor | None = None, q_start: int | None = None, reduce: str = "sum",
    threshold: float | str | None = None, group: str = "mean", alive: Tensor | None = None, scale: float | None = None,
    form: str = "auto",
) -> Tensor:  # fmt: skip
    """How much attention each key gets from the given query rows: (B, Hkv, L) float32, higher = more.

    Extra memory grows linearly with L, never as Lq x L.

    Args:
        q: (B, H, Lq, D); row i has index q_start + i among the keys and sees keys j <= q_start + i.
        k: (B, Hkv, L, D), as cached (after RoPE); Hkv divides H.
        lse: (B, H, Lq) natural log, where `attend` returned it already; saves one of the two passes.
        q_start: default L - Lq, the rows that belong to the newest keys.
        reduce: `sum`; `mean` over the rows that can see the key; `max`; `last` (the last row alone);
            `count_above`, `count_below`: rows that see the key with a probability above, below `threshold`.
        threshold: for the counts, a probability, or "1/t" for one over the number of keys that the row sees.
        group: over the g = H / Hkv query heads of a kv head: `mean`, `max`, `sum`; `none` returns (B, H, L).
        alive: (B, L) or (B, Hkv, L) bool; False takes a key out of the softmax (padding) and scores it 0.
        scale: of the scores, default D ** -0.5.
        form: "reference" (row by row), "torch" (blocks of rows), "triton" (the kernel), "auto".
    Raises:
        ValueError: shapes that disagree, rows beyond the last key, an unknown word, a threshold that is missing or
            not wanted.
        RuntimeError: form="triton" where it cannot run, saying why.
    """
    call = _checked(q, k, lse, q_start, reduce, threshold, group, alive, scale)
    mass = _FORMS[backend.choose("column_mass", form, q, k)](call)
    if reduce == "mean":
        index = torch.arange(k.shape[2], device=k.device)
        mass = mass / (q.shape[2] - (index - call.q_start).clamp(min=0)).clamp(min=1)
    return group_heads(mass, k.shape[1], group)


@torch.no_grad()
def gumbel_mass(
    q: Tensor, k: Tensor, *, tau: float | Tensor, noise: Tensor | None, q_start: int | None = None, group: str = "mean",
    alive: Tensor | None = None, scale: float | None = None, form: str = "torch",
) -> Tensor:  # fmt: skip
    """The column sums of softmax((s + noise) / tau), s = scale · q·k: (B, Hkv, L) float32, higher = more.

    With Gumbel(0, 1) noise a row is a softened draw of one key with probability P_ij: as tau -> 0 the mean over draws
    tends to P, at tau = 1 it is flatter. A large tau gives every visible key the same. Zero noise and tau = 1 is `column_mass`.

    Args:
        q, k, q_start, group, alive, scale: as in `column_mass`.
        tau: above 0, one number or one for each row (Lq,).
        noise: (B, H, Lq, L), drawn by the caller; None for none. What a row cannot see is not used.
        form: "reference" or "torch".
    Raises:
        ValueError: tau <= 0, noise of another shape, and as `column_mass`.
    Source: arXiv:2403.09054, equations 5 to 8.
    """
    check.one_of("gumbel_mass", ("reference", "torch"), form=form)
    call = _checked(q, k, None, q_start, "sum", None, group, alive, scale)
    rows = torch.as_tensor(tau, dtype=torch.float32, device=q.device).expand(q.shape[2])
    if not bool((rows > 0).all()):
        check.fail("gumbel_mass", f"tau={float(rows.min())}", "tau > 0", "a temperature divides the scores")
    if noise is not None and noise.shape != (wanted := (*q.shape[:3], k.shape[2])):
        check.fail("gumbel_mass", f"noise of shape {tuple(noise.shape)}", f"{wanted}: one draw for each row and key")
    mass = _FORMS[form](call._replace(noise=None if noise is None else noise.float(), tau=rows))
    return group_heads(mass, k.shape[1], group)


def group_heads(x: Tensor, kv_heads: int, how: str) -> Tensor:
    """(B, H, L) per query head to (B, Hkv, L): `mean`, `max` or `sum` over each kv head's group; `none` returns x.

    Raises:
        ValueError: kv_heads that do not divide H, or an unknown word.
    """
    check.one_of("group_heads", GROUPS, group=how)
    check.divides("group_heads", kv_heads=kv_heads, heads=x.shape[1])
    if how == "none":
        return x
    grouped = x.unflatten(1, (kv_heads, -1))
    return grouped.amax(2) if how == "max" else getattr(grouped, how)(2)


def _checked(q, k, lse, q_start, reduce, threshold, group, alive, scale) -> Mass:
    sizes = check.shapes(
        "column_mass", q=(q, "batch heads q_len dim"), k=(k, "batch kv_heads k_len dim"), lse=(lse, "batch heads q_len")
    )
    check.divides("column_mass", kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    check.one_of("column_mass", REDUCES, reduce=reduce)
    check.one_of("column_mass", GROUPS, group=group)
    check.at_least("column_mass", 1, q_len=sizes["q_len"])
    start = sizes["k_len"] - sizes["q_len"] if q_start is None else int(q_start)
    if start < 0 or start + sizes["q_len"] > sizes["k_len"]:
        came = f"rows {start} to {start + sizes['q_len'] - 1} of {sizes['k_len']} keys"
        check.fail("column_mass", came, "every row's own key among k", "append the new keys first, or change q_start")
    if (threshold is not None) != reduce.startswith("count"):
        came = f"threshold={threshold!r} with reduce={reduce!r}"
        check.fail("column_mass", came, "a threshold for the counts, and only there")
    if alive is not None:
        alive = alive[:, None].expand(-1, sizes["kv_heads"], -1) if alive.ndim == 2 else alive
        check.shapes("column_mass", k=(k, "batch kv_heads k_len dim"), alive=(alive, "batch kv_heads k_len"))
    if reduce == "last":
        start, q = start + sizes["q_len"] - 1, q[:, :, -1:]
        lse = None if lse is None else lse[:, :, -1:]
    limit = _limit(threshold, reduce, alive, start, q, k)
    kind = "sum" if reduce in ("mean", "last") else reduce
    return Mass(q, k, lse, alive, limit, start, q.shape[-1] ** -0.5 if scale is None else float(scale), kind)


def _limit(threshold, reduce: str, alive: Tensor | None, start: int, q: Tensor, k: Tensor) -> Tensor | None:
    if threshold is None:
        return None
    rows = (k.shape[0], k.shape[1], q.shape[2])
    if threshold != "1/t":
        if isinstance(threshold, str):
            check.fail("column_mass", f"threshold={threshold!r}", "a number or '1/t'")
        return torch.full(rows, float(threshold), device=q.device)
    if alive is None:
        seen = torch.arange(start + 1, start + 1 + q.shape[2], device=q.device).expand(rows)
    else:
        seen = alive.cumsum(-1)[..., start : start + q.shape[2]].clamp(min=1)
    # a row with equal weights sits on 1/t exactly: rounding must not push it to either side
    return (1 + 1e-5 if reduce == "count_above" else 1 - 1e-5) / seen


def _reference(call: Mass) -> Tensor:
    """The definition: all rows of P, then one reduction down each column. (B, H, L)"""
    group = call.q.shape[1] // call.k.shape[1]
    q, k = call.q.float(), call.k.float().repeat_interleave(group, 1)
    alive = None if call.alive is None else call.alive.repeat_interleave(group, 1)
    limit = None if call.limit is None else call.limit.repeat_interleave(group, 1)
    index, columns = torch.arange(k.shape[2], device=k.device), []
    for i in range(q.shape[2]):
        seen = (index <= call.q_start + i).expand(k.shape[:3])
        seen = seen if alive is None else seen & alive
        score = (q[:, :, i, None] * k).sum(-1).mul(call.scale)  # (B, H, L)
        score = score if call.noise is None else score + call.noise[:, :, i]
        score = (score if call.tau is None else score / call.tau[i]).masked_fill(~seen, -torch.inf)
        lse = score.logsumexp(-1) if call.lse is None else call.lse[:, :, i]
        p = (score - lse[..., None]).exp().masked_fill(~seen, 0.0)
        columns.append(_statistic(p, seen, None if limit is None else limit[:, :, i, None], call.reduce))
    stacked = torch.stack(columns)
    return stacked.amax(0) if call.reduce == "max" else stacked.sum(0)


def _statistic(p: Tensor, seen: Tensor, limit: Tensor | None, reduce: str) -> Tensor:
    if reduce == "count_above":
        return (seen & (p > limit)).float()
    if reduce == "count_below":
        return (seen & (p < limit)).float()
    return p


def _torch(call: Mass) -> Tensor:
    """Blocks of query rows against all the keys that they see, in powers of two: exp2 costs a quarter of exp."""
    (batch, heads, rows), length = call.q.shape[:3], call.k.shape[2]
    q = _by_kv_head(call.q.float() * (call.scale * LOG2E), call)
    k = call.k.float().flatten(0, 1).transpose(-1, -2)
    total = torch.zeros(*q.shape[:2], length, device=q.device)
    # head by head where that fills a block: one product for all of them is not shared evenly between threads
    together = len(q) if batch * heads * rows * length <= TILE else 1
    step = min(rows, max(1, TILE // (together * q.shape[1] * length)))
    room = torch.empty(together * q.shape[1] * step * length, device=q.device)
    for at in (slice(head, head + together) for head in range(0, len(q), together)):
        for span in (slice(first, min(rows, first + step)) for first in range(0, rows, step)):
            seen = call.q_start + span.stop  # keys that the block's last row sees
            block = q[at, :, span]
            scores = room[: block[..., 0].numel() * seen].view(*block.shape[:3], seen)
            torch.bmm(block.flatten(1, 2), k[at, :, :seen], out=scores.flatten(1, 2))
            _add(total[at, :, :seen], scores, call, at, span)
    return total.view(batch, heads, length)


def _add(column: Tensor, scores: Tensor, call: Mass, at: slice, span: slice) -> None:
    """What a block of scores (heads, g, rows, keys), which it overwrites, adds to the columns (heads, g, keys)."""
    p, weight = _powers(scores, call, at, span)
    if call.reduce == "sum":
        column += p.sum(-2) if weight is None else (weight[..., None, :] @ p)[..., 0, :]
        return
    p = p if weight is None else p.mul_(weight[..., None])
    if call.reduce == "max":
        torch.maximum(column, p.amax(-2), out=column)
    else:
        column += _count(p, call, at, span)


def _powers(scores: Tensor, call: Mass, at: slice, span: slice) -> tuple[Tensor, Tensor | None]:
    """2^scores, 0 where hidden, and what to multiply each row by for probabilities: None with lse, which is in them then."""
    rows = scores.shape[2]
    if call.noise is not None:
        scores += _by_kv_head(call.noise, call)[at, :, span, : scores.shape[-1]] * LOG2E
    if call.tau is not None:
        scores /= call.tau[span, None]
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1)  # of the last keys only
    scores[..., -rows:].masked_fill_(hidden, -torch.inf)
    if call.alive is not None:
        scores.masked_fill_(~call.alive.flatten(0, 1)[at, None, None, : scores.shape[-1]], -torch.inf)
    top = scores.amax(-1) if call.lse is None else _by_kv_head(call.lse, call)[at, :, span] * LOG2E
    if call.lse is not None or call.alive is not None:
        top.masked_fill_(top == -torch.inf, 0.0)  # a row of padding sees nothing
    p = scores.sub_(top[..., None]).exp2_()
    if call.lse is not None:
        return p, None
    weight = p.sum(-1).reciprocal_()
    return p, weight if call.alive is None else weight.masked_fill_(weight == torch.inf, 0.0)


def _by_kv_head(x: Tensor, call: Mass) -> Tensor:
    """(B, H, ...) as (B · Hkv, g, ...)."""
    return x.unflatten(1, (call.k.shape[1], -1)).flatten(0, 1)


def _count(p: Tensor, call: Mass, at: slice, span: slice) -> Tensor:
    limit = call.limit.flatten(0, 1)[at, None, span, None]
    if call.reduce == "count_above":
        return (p > limit).sum(-2)
    below = p < limit
    below[..., -p.shape[-2] :].tril_()
    if call.alive is not None:
        below &= call.alive.flatten(0, 1)[at, None, None, : p.shape[-1]]
    return below.sum(-2)


def _triton(call: Mass) -> Tensor:
    from memlens_kernels.column_mass import column_mass as launch

    alive = None if call.alive is None else call.alive.contiguous()
    options = {"q_start": call.q_start, "scale": call.scale, "reduce": call.reduce}
    return launch(call.q, call.k, lse=call.lse, alive=alive, limit=call.limit, **options)


_FORMS = {"reference": _reference, "torch": _torch, "triton": _triton}


def smooth(score: Tensor, kernel: int, pool: str = "max") -> Tensor:
    """Each score pooled with its neighbours, so that a hit also keeps what stands beside it; same shape (..., L).

    `pool`: "max", or "avg", which counts the zeros beyond both ends as SnapKV's code does. kernel=1 changes nothing.

    Raises:
        ValueError: an even or non-positive kernel, or an unknown pool.
    """
    check.one_of("smooth", ("max", "avg"), pool=pool)
    if kernel < 1 or kernel % 2 == 0:
        check.fail("smooth", f"kernel={kernel}", "an odd kernel of at least 1", "use an odd one: it has a middle")
    if kernel == 1 or score.shape[-1] == 0:
        return score
    flat = score.reshape(1, -1, score.shape[-1])
    pooled = (F.max_pool1d if pool == "max" else F.avg_pool1d)(flat, kernel, stride=1, padding=kernel // 2)
    return pooled.view(score.shape)


def surprisal(logits: Tensor, ids: Tensor, prev_logits: Tensor | None = None) -> Tensor:
    """How unexpected each token was, -log P(ids[t] | logits at t-1): (B, L) nats, float32.

    Args:
        logits: (B, L, V); logits[:, t] predicts token t + 1.
        ids: (B, L) int64.
        prev_logits: (B, V), the logits before ids[:, 0]. Without them the first token gets +inf: it stays protected.
    Raises:
        ValueError: shapes that disagree.
    """
    before = (prev_logits, "batch vocab")
    sizes = check.shapes("surprisal", logits=(logits, "batch length vocab"), ids=(ids, "batch length"), prev_logits=before)
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    if prev_logits is None:
        first = nll.new_full((sizes["batch"], 1), torch.inf)
    else:
        first = F.cross_entropy(prev_logits.float(), ids[:, 0], reduction="none")[:, None]
    return torch.cat((first, nll), 1)


def retaining_scores(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """What a trained head expects each token to be worth to later queries: (B, Hkv, L) float32, higher = more.

    score_t = w2 · silu(w1 · [q_t; k_t; v_t]), all heads side by side. It depends on the token alone: later tokens cannot
    change it. Gradients flow, for training (`memlens.kv.locret`).

    Args:
        q: (B, H, L, D), k, v: (B, Hkv, L, D), before rotary positions.
        w1: (hidden, (H + 2 Hkv) · D); w2: (Hkv, hidden).
    Raises:
        ValueError: shapes that disagree.
    Source: arXiv:2410.01805, section 3.2.
    """
    cached = "batch kv_heads length dim"
    sizes = check.shapes(
        "retaining_scores", q=(q, "batch heads length dim"), k=(k, cached), v=(v, cached), w1=(w1, "hidden inputs"),
        w2=(w2, "kv_heads hidden"),
    )  # fmt: skip
    wanted = (sizes["heads"] + 2 * sizes["kv_heads"]) * sizes["dim"]
    if sizes["inputs"] != wanted:
        check.fail("retaining_scores", f"w1 for {sizes['inputs']} inputs", f"{wanted}: all heads of q, k and v")
    x = torch.cat((q, k, v), 1).float().transpose(1, 2).flatten(2)
    return F.linear(F.silu(F.linear(x, w1.float())), w2.float()).transpose(1, 2)


class Persistence(NamedTuple):
    """Shares in [0, 1], each (B, H)."""

    ratio: Tensor  # of the early keys that mattered late, how many had mattered early
    chance: Tensor  # of all early keys, how many mattered early: the ratio if nothing persisted


def persistence_ratio(p: Tensor, split: int, threshold: float | str = "1/t") -> Persistence:
    """Do the keys that mattered keep mattering? A key is pivotal for a row that gives it more than `threshold`.

    ratio = |early ∩ late| / |late| among the keys before `split`: early are those pivotal in some row before it, late those
    pivotal in some later row. Where no key is late, both shares are NaN: there is nothing to persist.

    Args:
        p: (B, H, L, L) causal attention probabilities; row i sees i + 1 keys.
        split: rows and keys before it are the first part, 1 to L - 1.
        threshold: a probability, or "c/t" for c times the weight of uniform attention over the keys that a row sees.
    Raises:
        ValueError: p that is not square, a split outside, a threshold of another form.
    Source: arXiv:2305.17118, section 3.
    """
    length = check.shapes("persistence_ratio", p=(p, "batch heads length length"))["length"]
    check.within("persistence_ratio", 1, length - 1, split=split)
    factor = threshold.removesuffix("/t") if isinstance(threshold, str) else threshold
    if isinstance(factor, str) and (factor == threshold or not factor.replace(".", "", 1).isdigit()):
        check.fail("persistence_ratio", f"threshold={threshold!r}", "a number or 'c/t', such as '1/t'")
    seen = torch.arange(1, length + 1, device=p.device)[:, None] if isinstance(threshold, str) else 1.0
    pivotal = p[..., :split] > (1 + 1e-5) * float(factor) / seen  # uniform rows are not pivotal by rounding
    early, late = pivotal[..., :split, :].any(-2), pivotal[..., split:, :].any(-2)
    count = late.sum(-1)
    nothing = torch.where(count > 0, 0.0, torch.nan)
    return Persistence((early & late).sum(-1) / count.clamp(min=1) + nothing, early.float().mean(-1) + nothing)


def hit_rate(keep_idx: Tensor, p_future: Tensor, top: int) -> Tensor:
    """Share of the `top` keys that later queries attend to most which were kept: (B, Hkv) in [0, 1].

    Args:
        keep_idx: (B, Hkv, b) int64 indices among the L keys.
        p_future: (B, H, Lq, L) attention probabilities of later queries; summed over rows and each kv head's group.
        top: how many keys count as the ones that mattered, 1 to L.
    Raises:
        ValueError: shapes that disagree, or top outside 1 to L.
    """
    mass = _future_mass("hit_rate", keep_idx, p_future)
    check.within("hit_rate", 1, p_future.shape[-1], top=top)
    wanted = mass.sort(dim=-1, descending=True, stable=True).indices[..., :top]
    kept = torch.zeros(mass.shape, device=mass.device).scatter_(-1, keep_idx, 1.0)
    return kept.gather(-1, wanted).mean(-1)


def retained_mass(keep_idx: Tensor, p: Tensor) -> Tensor:
    """Share of the attention probability of `p` (B, H, Lq, L) that falls on kept keys: (B, Hkv) in [0, 1]."""
    mass = _future_mass("retained_mass", keep_idx, p)
    return mass.gather(-1, keep_idx).sum(-1) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)


def _future_mass(op: str, keep_idx: Tensor, p: Tensor) -> Tensor:
    check.shapes(op, keep_idx=(keep_idx, "batch kv_heads kept"), p=(p, "batch heads q_len k_len"))
    return group_heads(p.float().sum(2), keep_idx.shape[1], "sum")
