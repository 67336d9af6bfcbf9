"""A Hugging Face cache that keeps what a policy chooses, layer by layer and head by head, and frees the rest.

    cache = PolicyCache(model.config, h2o(51, 51))
    with cache.on(model):
        model.generate(ids, past_key_values=cache, max_new_tokens=40)
    cache.nbytes()                                     # {"payload": ..., "positions": ..., "scores": ..., "memory": ...}

The model asks the cache how many tokens it has seen (positions follow from that); how many it holds is its own affair.
While `on` lasts, the model's attention runs here: new keys are stored, attention is computed over what is held, the policy
observes, and what it gives up is gone before the next layer starts. Public interfaces of transformers 5 only.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from memlens import check
from memlens.attention.rope import shift
from memlens.kv.listen import frequencies, listening, shape_of
from memlens.kv.merge import log_counts
from memlens.kv.policies import LayerState, Policy, full
from memlens.kv.select import positions, stream
from memlens.kv.storage import gathered
from memlens.kv.store import HeldLayer, refuse

__all__ = ["PolicyCache"]

NAME = "memlens_kv"
_active: ContextVar[PolicyCache | None] = ContextVar("memlens_kv_cache", default=None)


class PolicyCache(Cache):
    """A cache under one policy.

    Args:
        config: of the model that will use it.
        policy: a preset of `memlens.kv.policies`; `full()` keeps everything.
        hold_until: nothing is evicted before this many tokens have been seen: the length of a prompt that arrives in
            parts. A policy that compresses once does so when it is reached.
        undo: a forward cut short before its last layer has attended leaves the cache, once `on` is left, as it was; what
            each layer held lives until then. False frees it layer by layer, and such a cut spoils the cache.
    """

    def __init__(self, config: Any, policy: Policy | None = None, *, hold_until: int = 0, undo: bool = True):
        text = config.get_text_config()
        self._policy, self._shape, self.hold_until = policy or full(), shape_of(text), hold_until
        super().__init__(layers=[HeldLayer(self._policy.storage(index)) for index in range(text.num_hidden_layers)])
        self.state: tuple[LayerState | None, ...] = self._policy.init(text)
        self._inv_freq = self._scale = None  # the model's rotary frequencies, and the scale of its scores
        self._queries: list[list[Tensor]] | None = None
        self._model: weakref.ref | None = None  # whose keys these are
        self._undo, self._last = undo, None  # the cache as the last whole forward left it, while another is under way
        self.last_logits: Tensor | None = None  # (B, V), for a policy that hears: of the newest token
        self.peak_bytes = 0  # most that was held at once: a layer being stored in both forms, and what `undo` needs

    @property
    def policy(self) -> Policy:
        """Fixed for the cache's life: the state belongs to it."""
        return self._policy

    @policy.setter
    def policy(self, other: Policy) -> None:
        fix = f"{self._policy.name!r} to the end; see compress(), or start a new cache"
        check.fail("PolicyCache", "a change of policy", fix, error=AttributeError)

    @property
    def held(self) -> list[int]:
        """Tokens held by each layer, in every kv head."""
        return [layer.held for layer in self.layers]

    def positions(self, layer: int) -> Tensor:
        """Where the held tokens of a layer stood in the text, (B, Hkv, held) int32; negative for left padding."""
        if self.state[layer] is None:
            check.fail("PolicyCache", f"layer {layer} without tokens", "a forward first")
        return self.state[layer].stream.pos

    def nbytes(self) -> dict[str, int]:
        """Bytes of the storages that the cache keeps alive, by part."""
        states = [entry for entry in self.state if entry is not None]
        parts = {
            **gathered(layer.parts() for layer in self.layers),
            "positions": [entry.stream.pos for entry in states],
            "scores": [entry.stream.score for entry in states],
            "memory": [x for s in states for x in (*s.stream.aux.values(), s.memory) if isinstance(x, Tensor)]
            + [x for x in (self.last_logits,) if x is not None],
        }
        return {name: sum(x.untyped_storage().nbytes() for x in tensors) for name, tensors in parts.items()}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Called by the model for each layer: the new keys and values go in, all that are held come out."""
        if _active.get() is not self:
            refuse("a forward outside of the cache's context", "call the model inside `with cache.on(model):`")
        if layer_idx == 0 and (self._last is not None or len({layer.seen for layer in self.layers}) > 1):
            refuse("layers out of step (a forward was cut short)", "leave `on`, reset(), or go on from an earlier fork()")
        if layer_idx == 0 and self.layers[0].seen + key_states.shape[-2] >= self.hold_until:
            self._policy.fits(self.state, key_states.shape[-2])
        self._last = self.fork() if layer_idx == 0 and self._undo else self._last
        return super().update(key_states, value_states, layer_idx)

    def record(self, on: bool = True) -> list[list[Tensor]]:
        """Keep the queries of every forward from now on: per layer, a list of (B, H, n, D). For experiments."""
        self._queries = [[] for _ in self.layers] if on else None
        return self._queries or []

    def under(self, policy: Policy, queries: list[Tensor]) -> PolicyCache:
        """A cache that shows these queries (per layer, (B, H, held, D)) to another policy and lets it evict once."""
        if policy.hears:
            check.fail("compress", f"{policy.name}, which needs the logits", "a score from attention alone", "use prefill")
        twin = self.fork(hold_until=0)
        twin._policy, twin.state = policy, policy.init(layers=len(self.layers))
        pad = (self.positions(0)[:, 0] < 0).sum(-1)
        for index, layer in enumerate(twin.layers):
            layer.store = policy.storage(index)
            if layer.keys is None:  # a group of heads that has none here
                continue
            twin.observe(index, queries[index], layer.keys, pad=pad if bool(pad.any()) else None, scale=self._scale)
            twin.evict(index)
        return twin

    def fork(self, *, hold_until: int | None = None) -> PolicyCache:
        """Another cache with the same contents; neither sees what the other gets later. Nothing is copied."""
        twin = copy(self)
        twin.layers, twin._queries, twin._last = [copy(layer) for layer in self.layers], None, None
        twin.hold_until = self.hold_until if hold_until is None else hold_until
        return twin

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, to ask several questions of one context at once."""
        for layer in self.layers:
            layer.repeat(repeats)
        self.state = tuple(entry and entry.repeated(repeats) for entry in self.state)
        self.last_logits = None if self.last_logits is None else self.last_logits.repeat_interleave(repeats, 0)

    def reset(self) -> None:
        """An empty cache under the same policy."""
        super().reset()
        self.state, self.last_logits, self._model = self._policy.init(layers=len(self.layers)), None, None
        self._last = None

    @contextmanager
    def on(self, model: Any) -> Iterator[PolicyCache]:
        """Run the model's attention through this cache; its own implementation is restored afterwards.

        Raises:
            ValueError: another model or another shape, or a rolling policy on a model without plain rotary positions.
        """
        if (shape := shape_of(model.config.get_text_config())) != self._shape:
            check.fail("PolicyCache", f"a model of (layers, kv heads, dim) {shape}", f"{self._shape}", "a new cache")
        if self._model is not None and self._model() is not model and self.get_seq_length():
            check.fail("PolicyCache", "another model", "the one whose keys are held", "reset(), or a new cache")
        self._inv_freq, self._model = frequencies(model, self._policy), weakref.ref(model)
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _padding)
        before = model.config._attn_implementation
        token = _active.set(self)
        try:
            model.set_attn_implementation(NAME)
            with listening(self, model) if self._policy.hears else nullcontext():
                yield self
        finally:
            _active.reset(token)
            model.set_attn_implementation(before)
            self.__dict__.update({} if self._last is None else vars(self._last))  # a forward was cut short

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, pad: Tensor | None) -> Tensor:
        """One layer's attention over what it holds, (B, H, n, D); then the policy observes, and evicts if it is time."""
        before, rows, mask = self.state[index], q.shape[2], None
        bias, layer = None if before is None else log_counts(before.stream, rows, q.shape[1]), self.layers[index]
        placed = pad is not None or self._policy.rolling  # where the keys stand matters
        if layer.apart and (placed or bias is not None or self._policy.reads(before, rows)):
            k, v = layer.whole()
        if placed:
            pos = positions(before.stream if before else stream(*k.shape[:2], device=k.device), rows, pad)
            mask = None if pad is None else (pos >= 0).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
            if self._policy.rolling:
                offset = (pos >= 0).cumsum(-1) - 1 - pos  # to the token's rank among those held
                q, k = shift(q, offset[:, :1, -rows:], self._inv_freq), shift(k, offset, self._inv_freq)
        out, lse, mass = layer.attend(q, k, v, mask=mask, bias=bias, scale=scale, tally=self._policy.tallies)
        k = layer.blank()[0] if layer.apart else k
        if self._queries is not None:
            self._queries[index].append(q)
        self._scale = scale
        self.observe(index, q, k, lse=lse, mass=mass, pad=pad, scale=scale)
        if layer.seen >= self.hold_until and not self._policy.hears:
            self.evict(index)
        if index == len(self.layers) - 1 and not self._policy.hears:
            self._last = None
        return out

    def hear(self, surprise: Tensor, last_logits: Tensor) -> None:
        """After a forward: its tokens' surprisal (B, n), and the logits after the newest (B, V). Then all layers evict."""
        self.state, self.last_logits = self._policy.hear(self.state, surprise), last_logits.clone()
        for index in range(len(self.layers) if self.layers[0].seen >= self.hold_until else 0):
            self.evict(index)
        self._last = None

    def observe(self, index: int, q: Tensor, k: Tensor, **seen: Any) -> None:
        """Show the policy the rows q (B, H, n, D) of a layer, whose keys are the last n of k."""
        layer, start = self.layers[index], k.shape[2] - q.shape[2]
        layer.observe(q, seen.get("pad"))
        v = layer.blank()[1] if layer.apart else layer.values
        self.state = self._policy.observe(self.state, index, q, k, v, start, **seen)

    def evict(self, index: int) -> None:
        """Carry out the policy's plan for a layer; what it gives up is freed."""
        layer = self.layers[index]
        idx = self._policy.plan(self.state, index, layer.held)
        self.state, merged = self._policy.fold(self.state, index, layer.keys, layer.values, idx, self._inv_freq)
        self.state = self._policy.took(self.state, index, idx)
        old = () if self._last is None else self._last.layers[: index + 1]
        others = sum(other.settled for other in (*self.layers, *old) if other is not layer)
        self.peak_bytes = max(self.peak_bytes, others + layer.settle(idx, self.state[index].stream.score, merged))


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling=None, **options: Any):
    """What the model calls in place of its own attention; `attention_mask` is what `_padding` returned."""
    cache = _active.get()
    if cache is None or cache.layers[module.layer_idx].keys is not k:
        refuse("a forward without this cache", "pass past_key_values=cache inside `with cache.on(model):`")
    window, seen = options.get("sliding_window"), cache.layers[module.layer_idx].seen
    other = options.get("dropout") or options.get("softcap") or options.get("s_aux") is not None
    if other or (window is not None and seen > window) or (attention_mask is not None and attention_mask.ndim != 1):
        fix = "call model.eval(); pass a 2-d attention_mask; no softcap, attention sinks, or window that is exceeded"
        refuse("attention that is not plain and causal", fix)
    return cache.attend(module.layer_idx, q, k, v, scaling, attention_mask).transpose(1, 2).contiguous(), None


def _padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The model's 2-d mask as the number of padded tokens on the left of each row, (B,); None where there are none."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    pad = (~attention_mask.bool()).sum(-1)
    if not torch.equal(attention_mask.bool(), torch.arange(attention_mask.shape[1], device=pad.device) >= pad[:, None]):
        refuse("an attention_mask with holes or padding on the right", "pad on the left (tokenizer.padding_side = 'left')")
    if (cache := _active.get()) is not None:
        cache.policy.fits((), 0, padded=True)
    return pad
