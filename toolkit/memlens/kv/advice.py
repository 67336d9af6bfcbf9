"""Which cache methods fit a situation: bytes are computed for each composition, and what does not fit is refused with the reason.

    found = advise(context=32_000, batch=1, gpu_bytes=24e9, turns=3, accuracy_critical=True)
    found.ranked[0].name, found.ranked[0].fast           the first choice and its bytes on the GPU
    found.refused[0].why                                 why another one is not

Nothing is looked up by the name of a situation. Losses are measured ones where they are handed over; without them the composition
that keeps most is taken for the most faithful.
Source: the question is that of arXiv:2603.20397; the rules are ours, and written in `_objection`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from memlens import check
from memlens.cost.memory import LLAMA_7B, llama_weights
from memlens.kv.plan import GROUP, SELECTORS, Plan

__all__ = ["PLANS", "Advice", "Option", "Refused", "advise"]

PLANS = (
    Plan(),
    *(Plan(bits=bits, dropped=dropped) for bits in (4, 2) for dropped in (0.0, 0.25)),
    Plan(dropped=0.25),
    *(Plan("H2O", kept, bits) for kept in (0.5, 0.25) for bits in (16, 4)),
    Plan("H2O", 0.5, 4, 0.25),
    *(Plan("SnapKV", kept, bits) for kept in (0.5, 0.25) for bits in (16, 4)),
    Plan(away=True),
    Plan(bits=4, away=True),
)


class Option(NamedTuple):
    name: str
    keys: tuple[str, ...]  # catalogue keys of the methods
    fast: int  # bytes of the cache on the GPU
    slow: int  # bytes of it elsewhere
    loss: float | None  # as measured, e.g. KL in nats
    plan: Plan

    @property
    def rest(self) -> str:
        """What to say of the bytes elsewhere."""
        return f" here, {_gb(self.slow)} elsewhere" if self.slow else ""


class Refused(NamedTuple):
    name: str
    why: str


class Advice(NamedTuple):
    ranked: tuple[Option, ...]  # best first
    refused: tuple[Refused, ...]
    free: int  # bytes that the weights leave for the cache

    def __str__(self) -> str:
        lines = [
            f"{_gb(self.free)} are left by the weights",
            *(f"{one.name}: {_gb(one.fast)}{one.rest}" for one in self.ranked),
        ]
        return "\n".join([*lines, *(f"not {one.name}: {one.why}" for one in self.refused)])


def advise(
    context: int, batch: int, gpu_bytes: float, turns: int = 1, accuracy_critical: bool = False, *, config: Any = LLAMA_7B,
    weight_bytes: float = 2, itemsize: int = 2, measured: Mapping[str, float] | None = None, plans: Iterable[Plan] = PLANS,
) -> Advice:  # fmt: skip
    """Compositions of cache methods that fit, best first, with their bytes; the others with the reason against them.

    Where accuracy is critical the smallest loss comes first, and of equal ones the one that moves least; otherwise what stays
    on the GPU comes before what lies elsewhere.

    Args:
        context, batch: tokens of a request when it ends, and requests at a time.
        gpu_bytes: of the device, weights included.
        turns: questions that one context must answer.
        config: of the model, `cost.memory.Llama` or a transformers config.
        weight_bytes, itemsize: of one weight, and of one plain number of the cache.
        measured: loss by the name of a composition; those without one come after.
        plans: what is considered.
    Raises:
        ValueError: sizes below 1.
    """
    check.at_least("advise", 1, context=context, batch=batch, turns=turns, itemsize=itemsize)
    check.within("advise", 1, float("inf"), gpu_bytes=gpu_bytes)
    free = int(gpu_bytes - weight_bytes * sum(weight.numel for weight in llama_weights(config)))
    ranked, refused, losses = [], [], measured or {}
    for plan in plans:
        if why := _objection(plan, context, turns, accuracy_critical, config):
            refused.append(Refused(plan.name, why))
            continue
        sizes = plan.bytes(config, context, batch=batch, itemsize=itemsize)
        slow = sizes.get("slow", 0)
        option = Option(plan.name, plan.keys, sum(sizes.values()) - slow, slow, losses.get(plan.name), plan)
        if free < 0:
            refused.append(Refused(plan.name, f"the weights alone take {_gb(-free)} more than there is"))
        elif option.fast > free:
            refused.append(Refused(plan.name, f"its cache takes {_gb(option.fast)} and the weights leave {_gb(free)}"))
        else:
            ranked.append(option)
    return Advice(tuple(sorted(ranked, key=lambda option: _order(option, accuracy_critical))), tuple(refused), free)


def _order(option: Option, accuracy_critical: bool) -> tuple:
    unknown = option.loss is None
    loss = (unknown, -(option.fast + option.slow) if unknown else option.loss)
    return (*loss, option.slow) if accuracy_critical else (option.slow, *loss)


def _objection(plan: Plan, context: int, turns: int, accuracy_critical: bool, config: Any) -> str:
    """Why a composition does not suit, whatever its bytes; empty where it does."""
    selection, tokens = SELECTORS[plan.select], plan.tokens(context)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if turns > 1 and accuracy_critical and selection.evicts:
        return "it drops tokens for good, and a later turn may ask for them"
    if turns > 1 and selection.asks:
        return "it keeps what the prompt's end asks for, and later turns ask for something else"
    if tokens < selection.least:
        return f"{tokens} tokens are left, and it needs {selection.least}"
    if plan.bits != 16 and dim % GROUP:
        return f"heads of {dim} do not divide into groups of {GROUP}"
    return ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
