"""The protocol of a policy: a score, a budget, the protected ends, a moment, and what becomes of what goes.

`memlens.kv.policies` has the presets and says how it is run; the cache in `memlens.kv.cache` runs it inside a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.kv import eviction
from memlens.kv.merge import Merge, counted, fold, join_counts, split_counts
from memlens.kv.select import StreamState, extend, fixed_point, positions, repeat, stream, take, topk_keep

if TYPE_CHECKING:
    from memlens.kv.storage import Storage

__all__ = ["Block", "LayerState", "Policy", "no_score", "nothing"]


class Block(NamedTuple):
    """One forward of one layer, as a score sees it. Keys are those held, then the new ones."""

    q: Tensor  # (B, H, n, D), the new rows
    k: Tensor  # (B, Hkv, L, D)
    v: Tensor  # (B, Hkv, L, Dv)
    q_start: int  # index of the first new row among the keys: L - n
    lse: Tensor | None  # (B, H, n)
    alive: Tensor | None  # (B, Hkv, L) bool, False for padding; None where there is none
    pad: Tensor | None  # (B,) tokens of left padding in each row
    scale: float | None
    layer: int
    mass: Tensor | None = None  # (B, H, L), the probabilities of a single row, where attention has made them already


class LayerState(NamedTuple):
    stream: StreamState  # per token, gathered with the keys
    memory: Any = None  # what a score remembers besides, e.g. the last queries
    done: bool = False  # a policy that compresses once has done so
    merged: Any = None  # what a merge remembers, e.g. its threshold

    def repeated(self, times: int) -> LayerState:
        """The state of a batch whose every row is repeated."""
        both = (self.memory, self.merged)
        memory, merged = (x.repeat_interleave(times, 0) if isinstance(x, Tensor) else x for x in both)
        return self._replace(stream=repeat(self.stream, times), memory=memory, merged=merged)


Score = Callable[[LayerState, Block], LayerState]


class Policy(NamedTuple):
    name: str
    score: Score  # what a token is worth, carried from block to block
    budget: int | tuple[int, ...] | None = (
        None  # tokens per (layer, kv head), one for all layers or one each; None keeps all
    )
    first: int = 0  # sinks: always kept, inside the budget
    last: int | float = 0  # recent tokens: likewise; a float is a share of the budget beyond `first`
    when: str = "always"  # evict after every forward, or once at the end of the "prompt"
    rolling: bool = False  # attend as if the kept tokens stood at positions 0, 1, 2, ...
    slack: int = 0  # tokens below the budget that an eviction leaves, so that the next one is not due at once
    hears: bool = False  # its score needs the logits: it evicts after the forward, not after each layer
    store: Storage | None = None  # how what is kept is held, a format of memlens.kv.storage; None: as it is
    merge: Merge | None = None  # what becomes of the tokens that go; None: they are lost
    share: float | tuple[float, ...] | None = (
        None  # of the tokens seen, rounded up: what a layer holds in place of a budget
    )
    until: int | None = None  # tokens seen when it evicts for the last time, then without `last`; None: it goes on
    looks: bool = True  # its score reads queries, keys or values; False: positions, draws and what it hears are enough
    joint: bool = False  # its score needs all kv heads of a layer at once
    tallies: bool = False  # its score is made of rows' probabilities: a single row's are taken from attention itself
    distance: int | None = None  # after the prompt the token at index (held then) + distance goes, whatever its score

    def init(self, cfg: Any = None, layers: int | None = None) -> tuple[LayerState | None, ...]:
        """The state before any token, one entry per layer; `layers` defaults to the configuration's.

        Raises:
            ValueError: a budget below first + last or below 1, a budget for another number of layers.
        """
        layers = cfg.num_hidden_layers if layers is None else layers
        check.one_of(self.name, ("always", "prompt"), when=self.when)
        for many in (self.budget, self.share):
            if isinstance(many, tuple) and len(many) != layers:
                check.fail(self.name, f"{len(many)} budgets for {layers} layers", "one for each layer, or one number")
        for budget in self.budget if isinstance(self.budget, tuple) else (self.budget,):
            if budget is not None:
                self._protects(budget)
                if self.distance is not None:
                    check.within(self.name, self.first, budget, point=budget + self.distance)
        return (None,) * layers

    def _protects(self, budget: int) -> None:
        """Refuse a budget that cannot hold what is always kept."""
        fix = f"first={self.first}, last={self.last} and slack={self.slack} count inside the budget"
        low = max(1, self.first + self.recent(budget)) + self.slack
        check.at_least(self.name, low, fix, budget=budget)

    def fits(self, state: tuple, new: int, *, padded: bool = False) -> None:
        """Refuse, before a forward of `new` tokens, a plan that could not be carried out after it.

        A share of the tokens is a number only now; it may be too small for what is protected.

        Raises:
            ValueError: such a share, or one of a padded batch.
        """
        if self.share is not None and padded:
            fix = "a share of each is another number; run one by one"
            check.fail(self.name, "a padded batch", "rows of one length", fix)
        for layer, now in enumerate(state if self.share is not None else ()):
            held, step = (0, 0) if now is None else (now.stream.pos.shape[-1], now.stream.step)
            budget = self.tokens(layer, step + new)
            if budget >= held + new:
                continue
            if now is None or not now.done:
                self._protects(budget)
            elif self.distance is not None:
                check.within(self.name, self.first, budget, p=now.memory + self.distance)

    @property
    def scores(self) -> bool:
        """Whether its score tells tokens apart."""
        return self.score is not no_score

    def reads(self, state: LayerState | None, rows: int) -> bool:
        """Whether observing a block of `rows` now reads its keys; a policy that is done, or tallies one row, does not."""
        return self.looks and not (state is not None and state.done) and not (self.tallies and rows == 1)

    def stored(self, store: Storage) -> Policy:
        """The same choice, held in a format of `memlens.kv.storage`: `snapkv(128).stored(kivi(bits=4))`.

        Raises:
            ValueError: a format that cannot hold what this policy keeps, with the reason.
        """
        rewrites = self.merge is not None and self.when == "always"
        if why := "a merge rewrites tokens that are stored already" if rewrites else store.problem(self):
            check.fail(self.name, f"storage {store.name!r}", "a format that goes with it", why)
        return self._replace(store=store)

    def storage(self, layer: int) -> Storage | None:
        """The format of one layer; None where tokens are held as they are."""
        return self.store and self.stored(self.store).store.at(layer)

    def tokens(self, layer: int, seen: int | None = None) -> int | None:
        """Tokens that a kv head of this layer may hold once `seen` have come; None for all."""
        if self.share is not None and seen is not None:
            share = self.share[layer] if isinstance(self.share, tuple) else self.share
            return max(1, self.first, math.ceil(share * seen - 1e-9))
        return self.budget[layer] if isinstance(self.budget, tuple) else self.budget

    def recent(self, budget: int) -> int:
        """How many of the budget are for the newest tokens."""
        return round(self.last * max(0, budget - self.first)) if isinstance(self.last, float) else self.last

    def observe(
        self, state: tuple, layer: int, q: Tensor, k: Tensor, v: Tensor, q_start: int, lse: Tensor | None = None, *,
        mass: Tensor | None = None, pad: Tensor | None = None, scale: float | None = None,
    ) -> tuple:  # fmt: skip
        """The state after one more block of queries; k and v are all the keys held, the block's own at the end.

        lse (B, H, n) and mass (B, H, L) are attention's own, where it gave them.
        """
        check.at_least(self.name, 0, "hand over the held keys with the new ones appended", q_start=k.shape[2] - q.shape[2])
        before = state[layer] or LayerState(stream(k.shape[0], k.shape[1], device=k.device))
        before, count = split_counts(before)
        if count is not None:
            q, k, scale = counted(q, k, count, scale)
        alive = None if pad is None else positions(before.stream, q.shape[2], pad) >= 0
        block = Block(q, k, v, q_start, lse, alive, pad, scale, layer, mass)
        if before.done:
            after = before._replace(stream=extend(before.stream, nothing(block), pad=pad))
        else:
            after = self.score(before, block)
        return _put(state, layer, join_counts(after, count))

    def plan(self, state: tuple, layer: int, length: int) -> Tensor | None:
        """Which of the `length` tokens stay, (B, Hkv, b) ascending; None where all do."""
        now, alive = state[layer], _real(state[layer].stream.pos)
        if alive is not None:
            self.fits((), 0, padded=True)
        budget = self.tokens(layer, now.stream.step)
        if budget is None or budget >= length or (now.done and self.distance is None):
            return None
        if now.done:
            where = fixed_point(length, now.memory + self.distance, length - budget, start=self.first, alive=alive)
            return where.expand(*now.stream.pos.shape[:2], -1)
        last = 0 if self._ends(now.stream) else self.recent(budget)
        options = {"first": self.first, "last": last, "alive": alive}
        return topk_keep(now.stream.score, budget - self.slack, **options)

    def fold(self, state: tuple, layer: int, k: Tensor, v: Tensor, idx: Tensor | None, inv_freq: Tensor | None) -> tuple:
        """The state and the kept (k, v) with what goes merged into them; (state, None) where nothing is merged."""
        if self.merge is None or idx is None or state[layer].done:
            return state, None
        now, kept = fold(self.merge, state[layer], k, v, idx, inv_freq)
        return _put(state, layer, now), kept

    def took(self, state: tuple, layer: int, idx: Tensor | None) -> tuple:
        """The state once the plan was carried out (idx None: nothing went). A one-time policy is done with it."""
        now = state[layer]
        kept = now.stream if idx is None else take(now.stream, idx)
        if self.when != "prompt" and not self._ends(kept):
            return _put(state, layer, now._replace(stream=kept))
        # a point is counted from what the prompt left
        memory = now.memory if now.done or self.distance is None else self.tokens(layer, kept.step)
        return _put(
            state, layer, now._replace(stream=kept, memory=memory if self.distance is not None else None, done=True)
        )

    def _ends(self, held: StreamState) -> bool:
        return self.until is not None and held.step >= self.until

    def hear(self, state: tuple, surprise: Tensor) -> tuple:
        """The state once the surprisal (B, n) of the n newest tokens is known, for a policy that `hears`."""
        return tuple(eviction.hear(entry, surprise) for entry in state)


def _put(state: tuple, layer: int, value: LayerState) -> tuple:
    return (*state[:layer], value, *state[layer + 1 :])


def _real(pos: Tensor) -> Tensor | None:
    real = pos >= 0
    return None if bool(real.all()) else real


def nothing(block: Block) -> Tensor:
    return torch.zeros(block.k.shape[:3], device=block.k.device)


def no_score(state: LayerState, block: Block) -> LayerState:
    """Every token is worth 0."""
    return state._replace(stream=extend(state.stream, nothing(block), pad=block.pad))
