"""How many elements attention moves between slow and fast memory: the count that FlashAttention lowers.

`attention_io` is the formula, `traced` runs the same algorithms through a memory that counts, and `largest_tensor` watches
what a call keeps alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memlens import check

__all__ = ["ALGORITHMS", "attention_io", "largest_tensor", "traced"]

ALGORITHMS = ("standard", "flash1", "flash2")


def attention_io(
    n: int, d: int, sram: int, algo: str, *, block_q: int | None = None, block_k: int | None = None, density: float = 1.0
) -> dict[str, float]:
    """Elements read and written in slow memory by one forward pass over one head of n tokens: {"reads", "writes", ...}.

    standard: Q, K in, S out; S in, P out; P, V in, O out                       4nd + 4n²
    flash1:   K, V once; for each of ⌈n/Bc⌉ key blocks Q, O, ℓ, m in, O, ℓ, m out  2nd + ⌈n/Bc⌉ (3nd + 4n)
    flash2:   Q once, O and lse out; for each of ⌈n/Br⌉ query blocks K and V in   2nd + n + ⌈n/Br⌉ 2nd

    Args:
        n, d: tokens and head dim.
        sram: elements of fast memory; blocks are Bc = ⌈sram / 4d⌉ keys and Br = min(Bc, d) queries unless given.
        algo: "standard", "flash1" or "flash2".
        block_q, block_k: override Br and Bc.
        density: share of the (query block, key block) pairs that are visited; the traffic inside the double loop is
            multiplied by it (flash1 and flash2 only).
    Returns:
        reads, writes, total (elements; floats only where density is no divisor), block_q, block_k.
    Raises:
        ValueError: sizes below 1, an unknown algo, a density outside [0, 1] or with "standard".
    Source: arXiv:2205.14135, theorem 2 and proposition 4, with the constants counted instead of bounded.
    """
    check.one_of("attention_io", ALGORITHMS, algo=algo)
    check.at_least("attention_io", 1, n=n, d=d, sram=sram, block_q=block_q or 1, block_k=block_k or 1)
    check.within("attention_io", 0.0, 1.0, density=density)
    if algo == "standard" and density != 1:
        check.fail(
            "attention_io", f"density={density} with standard", "density=1", "standard attention has no blocks to skip"
        )
    keys = block_k or math.ceil(sram / (4 * d))
    rows = block_q or min(math.ceil(sram / (4 * d)), d)
    reads, writes = _COUNTS[algo](n, d, rows, keys, density)
    return {"reads": reads, "writes": writes, "total": reads + writes, "block_q": rows, "block_k": keys}


def _standard(n: int, d: int, rows: int, keys: int, density: float) -> tuple[float, float]:
    return 3 * n * d + 2 * n * n, n * d + 2 * n * n


def _flash1(n: int, d: int, rows: int, keys: int, density: float) -> tuple[float, float]:
    passes = math.ceil(n / keys) * density
    return 2 * n * d + passes * (2 * n * d + 2 * n), passes * (n * d + 2 * n)


def _flash2(n: int, d: int, rows: int, keys: int, density: float) -> tuple[float, float]:
    passes = math.ceil(n / rows) * density
    return n * d + passes * 2 * n * d, n * d + n


_COUNTS = {"standard": _standard, "flash1": _flash1, "flash2": _flash2}


class SlowMemory:
    """Named tensors outside the chip; every row that is loaded or stored is counted."""

    def __init__(self, **tensors: Tensor):
        self.tensors, self.reads, self.writes = tensors, 0, 0

    def load(self, name: str, rows: slice) -> Tensor:
        part = self.tensors[name][rows]
        self.reads += part.numel()
        return part

    def store(self, name: str, rows: slice, value: Tensor) -> None:
        self.tensors[name][rows] = value
        self.writes += value.numel()


def traced(
    q: Tensor, k: Tensor, v: Tensor, sram: int, algo: str, *, visible: Tensor | None = None
) -> tuple[Tensor, dict[str, int]]:  # fmt: skip
    """Non-causal attention of one head by `algo`, and the elements it read and wrote.

    Args:
        q, k, v: (n, d), one head.
        sram, algo: as in `attention_io`, whose block sizes are used.
        visible: (ceil(n / block_q), ceil(n / block_k)) bool; blocks that are False are skipped (flash1 and flash2).
    Returns:
        out (n, d) and {"reads", "writes", "total"}.
    Raises:
        ValueError: shapes that disagree, an unknown algo, or a `visible` of another shape or with "standard".
    """
    n, d = check.shapes("traced", q=(q, "n d"), k=(k, "n d"), v=(v, "n d")).values()
    plan = attention_io(n, d, sram, algo)
    spans = [[slice(i, min(i + size, n)) for i in range(0, n, size)] for size in (plan["block_q"], plan["block_k"])]
    need = tuple(map(len, spans))
    if visible is not None and (algo == "standard" or tuple(visible.shape) != need):
        check.fail("traced", f"visible {tuple(visible.shape)} with {algo}", f"{need} blocks with flash1 or flash2")
    seen = torch.ones(need, dtype=torch.bool) if visible is None else visible
    memory = SlowMemory(q=q, k=k, v=v, out=torch.zeros_like(q), scores=q.new_empty(n, n), probs=q.new_empty(n, n))
    memory.tensors |= {"top": q.new_full((n,), -torch.inf), "total": q.new_zeros(n), "lse": q.new_empty(n)}
    _LOOPS[algo](memory, *spans, seen, d**-0.5)
    return memory.tensors["out"], {"reads": memory.reads, "writes": memory.writes, "total": memory.reads + memory.writes}


def _loop_standard(memory: SlowMemory, rows: list[slice], keys: list[slice], seen: Tensor, scale: float) -> None:
    """Three passes over rows, each of which leaves its result in slow memory."""
    whole = slice(None)
    k = memory.load("k", whole)
    for i in rows:
        memory.store("scores", i, scale * memory.load("q", i) @ k.mT)
    for i in rows:
        memory.store("probs", i, memory.load("scores", i).softmax(-1))
    v = memory.load("v", whole)
    for i in rows:
        memory.store("out", i, memory.load("probs", i) @ v)


def _loop_flash1(memory: SlowMemory, rows: list[slice], keys: list[slice], seen: Tensor, scale: float) -> None:
    """Key blocks outside: the normalised output and its two statistics come and go with every key block."""
    for b, j in enumerate(keys):
        k, v = memory.load("k", j), memory.load("v", j)
        for i in (i for a, i in enumerate(rows) if seen[a, b]):
            q, out, total, top = (memory.load(name, i) for name in ("q", "out", "total", "top"))
            scores = scale * q @ k.mT
            new_top = torch.maximum(top, scores.amax(-1))
            weights, fade = (scores - new_top[:, None]).exp(), (top - new_top).exp() * total
            new_total = fade + weights.sum(-1)
            memory.store("out", i, (fade[:, None] * out + weights @ v) / new_total[:, None])
            memory.store("total", i, new_total)
            memory.store("top", i, new_top)


def _loop_flash2(memory: SlowMemory, rows: list[slice], keys: list[slice], seen: Tensor, scale: float) -> None:
    """Query blocks outside: the unnormalised output stays on the chip until its row is done."""
    for a, i in enumerate(rows):
        q = memory.load("q", i)
        top, total, held = q.new_full((len(q),), -torch.inf), q.new_zeros(len(q)), torch.zeros_like(q)
        for j in (j for b, j in enumerate(keys) if seen[a, b]):
            scores = scale * q @ memory.load("k", j).mT
            new_top = torch.maximum(top, scores.amax(-1))
            weights, fade = (scores - new_top[:, None]).exp(), (top - new_top).exp()
            total, held = total * fade + weights.sum(-1), held * fade[:, None] + weights @ memory.load("v", j)
            top = new_top
        empty = total == 0
        memory.store("out", i, held / total.masked_fill(empty, 1.0)[:, None])
        memory.store("lse", i, top + total.log())


_LOOPS = {"standard": _loop_standard, "flash1": _loop_flash1, "flash2": _loop_flash2}


class _Watch(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() // x.element_size() for x in _tensors(result))])
        return result


def _tensors(result) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


def largest_tensor(call: Callable[[], object]) -> int:
    """Elements of the largest tensor that any torch operation returned while `call` ran, backward included.

    A fused operator's own scratch is not seen; a view counts as the storage that it keeps alive.
    """
    with _Watch() as watch:
        call()
    return watch.largest
