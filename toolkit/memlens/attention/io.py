"""How many elements attention moves between slow and fast memory: the count that FlashAttention lowers."""

from __future__ import annotations

import math

from memlens import check

__all__ = ["ALGORITHMS", "attention_io"]

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
