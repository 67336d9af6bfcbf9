"""Linear attention by chunks: a walk over the chunks of a head carries the state, and programs for each chunk read from it.

    states    S after each chunk, in order; for the delta rule also what was written, u - w S
    read      out of each chunk: what came before through S, what is inside through a (C, C) product
    written   its transpose: the gradient that out gives to what was written, inside the chunk
    d_states  the gradient of S after each chunk, in reverse; completes that of what was written
    grads     those of q, k, w and the share of the decays that passes through S

u and w of the delta rule are solved for by the caller; decays, per head or per key channel, are float32.

Shapes: q, k (B, H|Hq|Hk, T, K), u (B, H|Hu, T, V), w (B, H, T, K), g (B, H, T[, K]), states (B, H, chunks + 1, K, V), all
contiguous; head h reads head h // group. Sources: arXiv:2006.16236, arXiv:2312.06635, section 4, arXiv:2406.06484, section 3.
"""

from __future__ import annotations

from itertools import product as product_of
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.chunk_parts import decays, load, pairs, pairs_backward, product, shared, store
from memlens_kernels.tile import TARGETS, Tile

__all__ = ["MAX_KEY", "Plan", "linear_backward", "linear_forward", "max_key", "plan", "tiles"]

MAX_KEY = 128
LENGTHS = ["heads", "q_group", "k_group", "u_group", "length", "chunks"]  # not specialised: one binary serves every length


@triton.jit(do_not_specialize=LENGTHS)
def states_kernel(
    k, u, w, g, states, writes, heads, k_group, u_group, length, chunks,
    KEY: tl.constexpr, VALUE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Slot 0 of states holds what comes in; slot n + 1 gets the state after chunk n."""
    head, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    size = tl.cast(length, tl.int64)
    k, u = shared(k, head, heads, k_group, size * KEY), shared(u, head, heads, u_group, size * VALUE)
    g += head * size * (KEY if DECAY == 2 else 1)
    states += head * (chunks + 1) * KEY * VALUE
    S = load(states, 0, column, KEY, VALUE, BK, BV)
    for row in range(0, length, C):
        k_tile = load(k, row, 0, length, KEY, C, BK)
        u_tile = load(u, row, column, length, VALUE, C, BV)
        if DELTA:
            w_tile = load(w + head * size * KEY, row, 0, length, KEY, C, BK)
            u_tile = u_tile.to(tl.float32) - product(w_tile, S, LOW)
            store(writes + head * size * VALUE, u_tile, row, column, length, VALUE, C, BV)
        if DECAY > 0:
            _, end, kept = decays(g, row, length, KEY, BK, C, DECAY)
            S = S * kept + product(tl.trans(k_tile * end), u_tile, LOW)
        else:
            S += product(tl.trans(k_tile), u_tile, LOW)
        states += KEY * VALUE
        store(states, S, 0, column, KEY, VALUE, BK, BV)


@triton.jit(do_not_specialize=LENGTHS)
def read_kernel(
    q, k, u, g, states, out, heads, q_group, k_group, u_group, length, chunks, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DECAY: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    chunk, head, column = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    size, row = tl.cast(length, tl.int64), chunk * C
    q, k = shared(q, head, heads, q_group, size * KEY), shared(k, head, heads, k_group, size * KEY)
    u = shared(u, head, heads, u_group, size * VALUE)
    g += head * size * (KEY if DECAY == 2 else 1)
    q_tile = load(q, row, 0, length, KEY, C, BK)
    k_tile = load(k, row, 0, length, KEY, C, BK)
    scores = pairs(q_tile, k_tile, g, row, length, KEY, BK, C, LEVELS, DECAY, LOW)
    read = product(scores, load(u, row, column, length, VALUE, C, BV), LOW)
    if DECAY > 0:
        start, _, _ = decays(g, row, length, KEY, BK, C, DECAY)
        q_tile = q_tile * start
    S = load(states + (head * (chunks + 1) + chunk) * KEY * VALUE, 0, column, KEY, VALUE, BK, BV)
    read += product(q_tile, S, LOW)
    store(out + head * size * VALUE, read * scale, row, column, length, VALUE, C, BV)


@triton.jit(do_not_specialize=LENGTHS)
def written_kernel(
    q, k, g, dout, du, heads, q_group, k_group, length, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DECAY: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    head, column = tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    size, row = tl.cast(length, tl.int64), tl.program_id(0) * C
    q, k = shared(q, head, heads, q_group, size * KEY), shared(k, head, heads, k_group, size * KEY)
    g += head * size * (KEY if DECAY == 2 else 1)
    q_tile = load(q, row, 0, length, KEY, C, BK)
    k_tile = load(k, row, 0, length, KEY, C, BK)
    scores = pairs(q_tile, k_tile, g, row, length, KEY, BK, C, LEVELS, DECAY, LOW)
    do = load(dout + head * size * VALUE, row, column, length, VALUE, C, BV)
    value = product(tl.trans(scores), do, LOW) * scale
    store(du + head * size * VALUE, value, row, column, length, VALUE, C, BV)


@triton.jit(do_not_specialize=LENGTHS)
def d_states_kernel(
    q, k, w, g, dout, du, d_states, heads, q_group, k_group, length, chunks, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """The last slot of d_states holds the gradient of the last state; slot n gets that of the state before chunk n."""
    head, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    size = tl.cast(length, tl.int64)
    q, k = shared(q, head, heads, q_group, size * KEY), shared(k, head, heads, k_group, size * KEY)
    g += head * size * (KEY if DECAY == 2 else 1)
    dout += head * size * VALUE
    du += head * size * VALUE
    d_states += (head * (chunks + 1) + chunks) * KEY * VALUE
    dS = load(d_states, 0, column, KEY, VALUE, BK, BV)
    for back in range(chunks):
        row = (chunks - 1 - back) * C
        q_tile = load(q, row, 0, length, KEY, C, BK)
        k_tile = load(k, row, 0, length, KEY, C, BK)
        do = load(dout, row, column, length, VALUE, C, BV)
        d_u = load(du, row, column, length, VALUE, C, BV)
        if DECAY > 0:
            start, end, kept = decays(g, row, length, KEY, BK, C, DECAY)
            d_u += product(k_tile * end, dS, LOW)
            dS = dS * kept + product(tl.trans(q_tile * start), do, LOW) * scale
        else:
            d_u += product(k_tile, dS, LOW)
            dS += product(tl.trans(q_tile), do, LOW) * scale
        if DELTA:
            w_tile = load(w + head * size * KEY, row, 0, length, KEY, C, BK)
            dS -= product(tl.trans(w_tile), d_u, LOW)
        store(du, d_u, row, column, length, VALUE, C, BV)
        d_states -= KEY * VALUE
        store(d_states, dS, 0, column, KEY, VALUE, BK, BV)


@triton.jit(do_not_specialize=LENGTHS)
def grads_kernel(
    q, k, u, g, states, dout, du, d_states, dq, dk, dw, dkept, heads, q_group, k_group, u_group, length, chunks, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """dq, dk, dw (B, H, T, K); dkept (B, H, chunks, K) is the state after each chunk times its gradient, summed over values."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    size, row = tl.cast(length, tl.int64), chunk * C
    q, k = shared(q, head, heads, q_group, size * KEY), shared(k, head, heads, k_group, size * KEY)
    u = shared(u, head, heads, u_group, size * VALUE)
    g += head * size * (KEY if DECAY == 2 else 1)
    states += (head * (chunks + 1) + chunk) * KEY * VALUE
    d_states += (head * (chunks + 1) + chunk + 1) * KEY * VALUE
    d_scores = tl.zeros([C, C], tl.float32)
    d_q, d_k, d_w = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    passed = tl.zeros([BK], tl.float32)
    for column in range(0, VALUE, BV):
        S = load(states, 0, column, KEY, VALUE, BK, BV)
        dS = load(d_states, 0, column, KEY, VALUE, BK, BV)
        u_tile = load(u, row, column, length, VALUE, C, BV)
        do = load(dout + head * size * VALUE, row, column, length, VALUE, C, BV)
        d_scores += product(do, tl.trans(u_tile), LOW)
        d_q += product(do, tl.trans(S), LOW)
        d_k += product(u_tile, tl.trans(dS), LOW)
        if DELTA:
            d_w -= product(load(du + head * size * VALUE, row, column, length, VALUE, C, BV), tl.trans(S), LOW)
        if DECAY > 0:
            passed += tl.sum(load(states + KEY * VALUE, 0, column, KEY, VALUE, BK, BV) * dS, 1)
    if DECAY > 0:
        start, end, _ = decays(g, row, length, KEY, BK, C, DECAY)
        d_q, d_k = d_q * start, d_k * end
        channels = tl.arange(0, BK)
        tl.store(dkept + (head * chunks + chunk) * KEY + channels, passed, mask=channels < KEY)
    if DELTA:
        store(dw + head * size * KEY, d_w, row, 0, length, KEY, C, BK)
    q_tile = load(q, row, 0, length, KEY, C, BK)
    k_tile = load(k, row, 0, length, KEY, C, BK)
    inner_q, inner_k = pairs_backward(d_scores * scale, q_tile, k_tile, g, row, length, KEY, BK, C, LEVELS, DECAY, LOW)
    store(dq + head * size * KEY, d_q * scale + inner_q, row, 0, length, KEY, C, BK)
    store(dk + head * size * KEY, d_k + inner_k, row, 0, length, KEY, C, BK)


class Plan(NamedTuple):
    chunk: int
    value_block: int
    warps: int


def max_key(*, channel: bool, dtype: torch.dtype) -> int:
    """The widest key that is taken: in float32 the gradients of wider ones spill where each channel decays on its own."""
    return 64 if channel and dtype == torch.float32 else MAX_KEY


def plan(key_dim: int, value_dim: int, *, channel: bool, dtype: torch.dtype, chunk: int = 64) -> Plan:
    """Tile sizes that do not spill; the chunk is the caller's where it is smaller.

    Raises:
        ValueError: key_dim over `max_key`.
    """
    if key_dim > (most := max_key(channel=channel, dtype=dtype)):
        came = f"key_dim={key_dim} in {dtype}{' with a decay per channel' if channel else ''}"
        raise ValueError(f"linear: {came}; the kernels take at most {most}; use form='torch'")
    small = channel or key_dim > 64 or dtype == torch.float32
    warps = 8 if key_dim > 64 and dtype == torch.float32 else 4
    return Plan(max(16, min(chunk, 16 if small else 32)), 16 if value_dim <= 16 or small else 32, warps)


def grads_plan(p: Plan, *, key_dim: int, dtype: torch.dtype, delta: bool, hip: bool) -> Plan:
    """The plan of the grads kernel, which holds three gradients of (chunk, K): narrower with w, more warps for long or wide keys.

    In float32 eight warps spare NVIDIA's registers; on AMD they halve them.
    """
    warps = 8 if key_dim > 64 or (dtype == torch.float32 and not hip) else p.warps
    return p._replace(value_block=16 if delta else p.value_block, warps=warps)


def _constants(q: Tensor, u: Tensor, g: Tensor | None, p: Plan) -> dict:
    key = q.shape[-1]
    return {
        "KEY": key, "VALUE": u.shape[-1], "BK": max(16, triton.next_power_of_2(key)), "BV": p.value_block, "C": p.chunk,
        "DECAY": 0 if g is None else g.ndim - 2, "LOW": LOW[q.dtype], "num_warps": p.warps, "num_stages": 2,
    }  # fmt: skip


LOW = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
LEVELS = {16: 4, 32: 5}


def linear_forward(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    w: Tensor | None,
    g: Tensor | None,
    first: Tensor,
    *,
    scale: float,
    p: Plan,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, T, V) in `dtype`, what was written (B, H, T, V; u itself without w), states (B, H, chunks + 1, K, V) float32.

    Args:
        q, k, u, w, g: as at the top of this module, contiguous. first: (B, H, K, V) float32, the state before the first token.
    """
    batch, heads, key, value = first.shape
    length = q.shape[2]
    chunks, blocks = triton.cdiv(length, p.chunk), triton.cdiv(value, p.value_block)
    same = _constants(q, u, g, p)
    g = first if g is None else g  # a pointer that DECAY = 0 never reads
    sizes = {
        "heads": heads,
        "k_group": heads // k.shape[1],
        "u_group": heads // u.shape[1],
        "length": length,
        "chunks": chunks,
    }
    states = first.new_empty(batch, heads, chunks + 1, key, value)
    states[:, :, 0] = first
    writes = u if w is None else u.new_empty(u.shape)
    out = q.new_empty(batch, heads, length, value, dtype=dtype)
    states_kernel[(batch * heads, blocks)](k, u, w, g, states, writes, **sizes, **same, DELTA=w is not None)
    read_kernel[(chunks, batch * heads, blocks)](
        q, k, writes, g, states, out, q_group=heads // q.shape[1], scale=scale, **sizes, **same, LEVELS=LEVELS[p.chunk]
    )
    return out, writes, states


class Grads(NamedTuple):
    q: Tensor  # (B, H, T, K) float32, for each head; heads that shared are for the caller to add up
    k: Tensor
    u: Tensor  # (B, H, T, V) float32
    w: Tensor | None  # (B, H, T, K) float32
    kept: Tensor | None  # (B, H, chunks, K) float32: the state after each chunk times its gradient, summed over values
    first: Tensor  # (B, H, K, V) float32


def linear_backward(q, k, writes, w, g, states, dout, dlast, *, scale: float, p: Plan) -> Grads:
    """Gradients from those of out (B, H, T, V) and of the last state (B, H, K, V); arguments as `linear_forward` gave them."""
    batch, heads, slots, key, value = states.shape
    length, chunks = q.shape[2], slots - 1
    blocks = triton.cdiv(value, p.value_block)
    same, levels = _constants(q, writes, g, p), LEVELS[p.chunk]
    wider = _constants(
        q, writes, g, grads_plan(p, key_dim=key, dtype=q.dtype, delta=w is not None, hip=torch.version.hip is not None)
    )
    kept = None if g is None else states.new_empty(batch, heads, chunks, key)
    g = states if g is None else g  # a pointer that DECAY = 0 never reads
    groups = {"q_group": heads // q.shape[1], "k_group": heads // k.shape[1]}
    sizes = {"heads": heads, **groups, "length": length, "scale": scale}
    d_states = states.new_empty(states.shape)
    d_states[:, :, -1] = dlast
    du = states.new_empty(batch, heads, length, value)
    written_kernel[(chunks, batch * heads, blocks)](q, k, g, dout, du, **sizes, **same, LEVELS=levels)
    d_states_kernel[(batch * heads, blocks)](
        q, k, w, g, dout, du, d_states, chunks=chunks, **sizes, **same, DELTA=w is not None
    )
    dq, dk = (states.new_empty(batch, heads, length, key) for _ in range(2))
    dw = None if w is None else states.new_empty(dq.shape)
    grads_kernel[(chunks, batch * heads)](
        q, k, writes, g, states, dout, du, d_states, dq, dk, dw, kept, u_group=heads // writes.shape[1], chunks=chunks,
        **sizes, **wider, LEVELS=levels, DELTA=w is not None,
    )  # fmt: skip
    return Grads(dq, dk, du, dw, kept, d_states[:, :, 0])


KERNELS = {
    "states": states_kernel, "read": read_kernel, "written": written_kernel, "d_states": d_states_kernel, "grads": grads_kernel,
}  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NATIVE = ("q", "k", "u", "v", "dout")  # pointers to the inputs' dtype
AT = "length 4096, one head"
LENGTH = 4096
DECAYS = ([], ["decay per head"], ["decay per channel"])
AMD = ("gfx942",)
NVIDIA = tuple(target for target in TARGETS if target not in AMD)


def kind(name: str, dtype: str, *, delta: bool = False) -> str:
    """The compile signature of one argument of these kernels by its name."""
    if name in (*LENGTHS, "v_group"):
        return "i32"
    if name == "scale":
        return "fp32"
    return f"*{dtype}" if name in NATIVE and not (delta and name == "u") else "*fp32"


def tiles() -> list[Tile]:
    """Key and value dims 64 and 128: plain, decay per head, per channel; but for float16 also the delta rule with each.

    float16 runs with bfloat16's tiles and is listed without the delta rule at dim 64 only; where `max_key` is 64, 128 is not.
    """
    made = []
    for dtype, dim in (("fp16", 64), ("bf16", 64), ("bf16", 128), ("fp32", 64), ("fp32", 128)):
        taken = [decay for decay in range(3) if dim <= max_key(channel=decay == 2, dtype=DTYPES[dtype])]
        rules = [(decay, False) for decay in taken] + [(decay, True) for decay in taken if dtype != "fp16"]
        for (decay, delta), name in product_of(rules, KERNELS):
            if delta and name in ("read", "written"):  # the same kernels as without the rule
                continue
            split = name == "grads" and dtype == "fp32"
            made += [_tile(name, dtype, dim, decay, delta, targets) for targets in ((NVIDIA, AMD) if split else (TARGETS,))]
    return made


def _tile(name: str, dtype: str, dim: int, decay: int, delta: bool, targets: tuple[str, ...]) -> Tile:
    kernel, p = KERNELS[name], plan(dim, dim, channel=decay == 2, dtype=DTYPES[dtype])
    if name == "grads":
        p = grads_plan(p, key_dim=dim, dtype=DTYPES[dtype], delta=delta, hip=targets == AMD)
    given = {
        "KEY": dim, "VALUE": dim, "BK": dim, "BV": p.value_block, "C": p.chunk, "LEVELS": LEVELS[p.chunk], "DECAY": decay,
        "DELTA": delta, "LOW": LOW[DTYPES[dtype]],
    }  # fmt: skip
    constants = {key: value for key, value in given.items() if key in kernel.arg_names}
    signature = {key: "constexpr" if key in constants else kind(key, dtype, delta=delta) for key in kernel.arg_names}
    words = [f"{dtype} K{dim} V{dim} chunk {p.chunk} block {p.value_block}", *DECAYS[decay], *(["delta"] if delta else [])]
    at = AT if name in ("states", "d_states") else f"one chunk of {p.chunk}"
    cost = _cost(name, dim, p, 4 if dtype == "fp32" else 2, decay, delta)
    return Tile(kernel, " ".join(words), signature, constants, p.warps, 2, *cost, at, targets)


def _cost(name: str, dim: int, p: Plan, width: int, decay: int, delta: bool) -> tuple[int, int]:
    """(flops, bytes) of one program. A chunk's (C, K) by (K, V) products, its (C, C) ones, and each operand moved once."""
    c, v = p.chunk, p.value_block
    met = 2 * c * c * dim * (LEVELS[c] if decay == 2 else 1)  # the pairs of a chunk
    wide, state = 2 * c * dim * v, 4 * dim * v
    gates = 4 * c * {0: 0, 1: 1, 2: dim}[decay]
    rows = c * (dim + v) * width + gates
    chunks = -(-LENGTH // c)
    return {
        "states": (chunks * wide * (1 + delta), chunks * (rows + state + 4 * c * (dim + v) * delta)),
        "read": (met + wide + 2 * c * c * v, rows + c * dim * width + state + 4 * c * v),
        "written": (met + 2 * c * c * v, rows + c * dim * width + 4 * c * v),
        "d_states": (
            chunks * wide * (2 + delta),
            chunks * (rows + c * dim * width + state + 8 * c * v + 4 * c * dim * delta),
        ),
        "grads": (
            2 * met + (dim // v) * (wide * (2 + delta) + 2 * c * c * v),
            2 * c * dim * width + gates + (dim // v) * (2 * state + 2 * c * v * width) + 8 * c * dim,
        ),
    }[name]
