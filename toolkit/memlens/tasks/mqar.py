"""Multi-query associative recall: pairs of key and value, then keys again at random distances; which value belongs to each?

Source: arXiv:2312.04927, section 4 (the task and its power-law gaps). Here filler is drawn from keys that the row did not bind, so a
perfect memory scores 1; there it is drawn from the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memlens import check

__all__ = ["mqar", "mqar_batches", "recall_accuracy"]


def mqar(
    count: int, *, pairs: int, length: int = 128, vocab: int = 256, gap_power: float = 0.01, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens and targets, both (count, length) int64; a target is the bound value where a key comes again, else -100.

        k1 v1 k2 v2 .. | filler and, in random slots of two, each key once more

    Slot s = 1, 2, .. after the pairs is drawn without replacement with weight s**(gap_power - 1): most queries come early, a few late.

    Args:
        count: rows. pairs: bindings, and so queries, in a row.
        length: tokens; at least 4 pairs, so that every query has a slot.
        vocab: keys and filler are tokens 1 .. vocab/2 - 1, values vocab/2 .. vocab - 1; in a row each binding is distinct.
        gap_power: in (0, 1], 1 is uniform.
    Raises:
        ValueError: a size that does not fit, named.
    """
    op = "mqar"
    check.at_least(op, 1, count=count, pairs=pairs)
    check.within(op, 1e-6, 1, gap_power=gap_power)
    check.at_least(op, 4 * pairs, f"{pairs} pairs need {4 * pairs} tokens", length=length)
    check.at_least(op, 2 * pairs + 4, "keys, values and filler must be distinct", vocab=vocab)
    half = vocab // 2
    names = 1 + torch.rand(count, half - 1, generator=generator).argsort(-1)
    values = half + torch.rand(count, vocab - half, generator=generator).argsort(-1)[:, :pairs]
    keys = names[:, :pairs]
    tokens = names.gather(1, torch.randint(pairs, half - 1, (count, length), generator=generator))
    targets = torch.full_like(tokens, -100)
    tokens[:, : 2 * pairs] = torch.stack((keys, values), dim=-1).flatten(1)
    slots = (length - 2 * pairs) // 2
    weight = torch.arange(1, slots + 1, dtype=torch.float64) ** (gap_power - 1)
    where = 2 * pairs + 2 * torch.multinomial(weight.expand(count, -1), pairs, generator=generator)
    return tokens.scatter_(1, where, keys), targets.scatter_(1, where, values)


def mqar_batches(
    batch: int, *, pairs: Sequence[int], generator: torch.Generator, **sizes
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, taking the numbers of pairs in turn; `sizes` as in `mqar`."""
    while True:
        for number in pairs:
            yield mqar(batch, pairs=number, generator=generator, **sizes)


def recall_accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of scored positions where the largest logit is the target; logits (count, length, vocab).

    Raises:
        ValueError: shapes that disagree, or no scored position.
    """
    check.shapes("recall_accuracy", logits=(logits, "count length vocab"), targets=(targets, "count length"))
    scored = targets != -100
    if not bool(scored.any()):
        check.fail("recall_accuracy", "no target", "at least one target other than -100")
    return (logits.argmax(-1) == targets)[scored].double().mean().item()
