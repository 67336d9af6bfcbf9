"""A composition of cache methods as four numbers: which tokens stay, how many, in how many bits, with how many channels.

    plan = Plan("H2O", kept=0.5, bits=4, dropped=0.25)
    plan.name                                  "H2O 50 % + ThinK 25 % + KIVI-4"
    plan.policy(512)                           h2o(128, 128).stored(think(0.25, inner=kivi(4)))
    plan.bytes(config, 512)                    what it will hold, from sizes alone

Tokens, channels and bits are different axes of one tensor, so their shares of the bytes multiply, but for what a format keeps
besides: scales, indices, and the newest tokens that wait unquantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from memlens import check
from memlens.cost.memory import kv_bytes
from memlens.kv.d2o import d2o
from memlens.kv.kivi import kivi
from memlens.kv.policies import Policy, full, h2o, snapkv
from memlens.kv.storage import Storage, plain
from memlens.kv.think import think

__all__ = ["SELECTORS", "Plan", "Selector"]

GROUP = RESIDUAL = 32


class Selector(NamedTuple):
    make: Callable[[int, float], Policy]  # of the budget in tokens, and of the share that it is
    keys: tuple[str, ...]  # catalogue keys
    least: int  # tokens that it cannot go below
    evicts: bool = True
    asks: bool = False  # it looks for what the prompt's last rows ask


SELECTORS = {
    "all": Selector(lambda budget, share: full(), (), 1, evicts=False),
    "H2O": Selector(lambda budget, share: h2o(budget // 2, budget - budget // 2), ("h2o",), 2),
    "SnapKV": Selector(lambda budget, share: snapkv(budget), ("snapkv",), 33, asks=True),
    # what goes is merged into the values that stay; once, since a merge cannot rewrite what is stored already
    "D2O": Selector(lambda budget, share: d2o(share, keys="none")._replace(when="prompt"), ("d2o",), 8),
}


class Plan(NamedTuple):
    select: str = "all"  # a name of SELECTORS
    kept: float = 1.0  # share of the prompt's tokens, in (0, 1]
    bits: int = 16  # KIVI's, of keys and values
    dropped: float = 0.0  # ThinK's share of the key channels
    away: bool = False  # the cache lies in another device's memory, and attention is computed there

    @property
    def name(self) -> str:
        parts = [f"{self.select} {100 * self.kept:g} %"] if self.select != "all" else []
        parts += [f"ThinK {100 * self.dropped:g} %"] if self.dropped else []
        parts += [f"KIVI-{self.bits}"] if self.bits != 16 else []
        return (" + ".join(parts) or "full") + (" elsewhere" if self.away else "")

    @property
    def keys(self) -> tuple[str, ...]:
        """Catalogue keys of the methods that it composes."""
        rest = {"think": self.dropped > 0, "kivi": self.bits != 16, "lamina": self.away}
        return (*SELECTORS[self.select].keys, *(key for key, there in rest.items() if there))

    @property
    def parts(self) -> int:
        """How many axes it compresses."""
        return (self.select != "all") + (self.bits != 16) + (self.dropped > 0)

    def tokens(self, length: int) -> int:
        """Tokens held of a prompt of `length`: round(kept · length)."""
        check.at_least("Plan", 1, length=length)
        return round(self.kept * length)

    def store(self) -> Storage:
        """The format in which the tokens are held."""
        inner = plain() if self.bits == 16 else kivi(self.bits, group=GROUP, residual=RESIDUAL)
        return think(self.dropped, tail=0, inner=inner) if self.dropped else inner

    def policy(self, length: int) -> Policy:
        """The policy for a prompt of `length` tokens.

        Raises:
            ValueError: an unknown selection, a share outside, a budget that its selection cannot hold.
        """
        check.one_of("Plan", SELECTORS, select=self.select)
        check.within("Plan", 1e-9, 1.0, kept=self.kept)
        chosen = SELECTORS[self.select]
        if chosen.evicts is (self.kept == 1.0):
            fix = "a share below 1 with a selection, and 1 with 'all'"
            check.fail("Plan", f"select={self.select!r}, kept={self.kept}", fix)
        check.at_least("Plan", chosen.least, f"{self.select} needs them", tokens=self.tokens(length))
        policy = chosen.make(self.tokens(length), self.kept)
        return policy if self.parts == (self.select != "all") else policy.stored(self.store())

    def bytes(self, config: Any, length: int, *, batch: int = 1, itemsize: int = 2) -> dict[str, int]:
        """Bytes by part that the cache of a prompt of `length` tokens holds; those that lie elsewhere are "slow"."""
        found = kv_bytes(config, self.tokens(length), batch=batch, store=self.store(), itemsize=itemsize)
        return {"slow": sum(found.values())} if self.away else found
