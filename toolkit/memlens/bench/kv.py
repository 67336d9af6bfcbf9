"""Scores, compressed prefills and decoding: against torch's attention without scores, a plain prefill and NVIDIA's kvpress.

The prefills run four layers of SmolLM2's widths with random weights: the cost of a layer is that of the real model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from memlens.bench.case import Case
from memlens.kv.kivi import Kivi, kivi
from memlens.kv.observe import decode_observe
from memlens.kv.policies import Block, LayerState, Policy, h2o, nothing, snapkv, streaming
from memlens.kv.score import column_mass
from memlens.kv.select import extend
from memlens.kv.storage import held_bytes

__all__ = ["cases", "kvpress"]

LENGTH, BUDGET, WINDOW = 1024, 205, 32
HELD = 4096  # tokens before a step
DECODE = 50  # steps of one call


def kvpress(name: str) -> Any | None:
    """A press of PyPI's kvpress, by module and class; None where it is not installed.

    The package's own file imports its evaluation pipeline and what that needs, so the package is entered without it.
    """
    spec = find_spec("kvpress")
    if spec is None:
        return None
    module, _, press = name.partition(":")
    package = ModuleType("kvpress")
    package.__path__ = list(spec.submodule_search_locations)
    held = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == "kvpress"}
    sys.modules["kvpress"] = package
    try:
        return getattr(import_module(f"kvpress.presses.{module}"), press)
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == "kvpress"]:
            del sys.modules[key]
        sys.modules.update(held)


def _model(implementation: str = "sdpa") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=128, max_position_embeddings=2 * LENGTH, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def _plain(model: Any, ids: torch.Tensor) -> object:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    place = torch.arange(ids.shape[1])  # kvpress reads it to tell a prompt from a step
    return model(ids, past_key_values=cache, logits_to_keep=1, cache_position=place).logits


def _compressed(model: Any, ids: torch.Tensor, policy: Policy) -> Callable[[], object]:
    from memlens.kv.cache import prefill

    return lambda: prefill(model, ids, policy).logits


def _pressed(model: Any, ids: torch.Tensor, press: Any) -> Callable[[], object]:
    def run():
        with press(model):
            return _plain(model, ids)

    return run


def _key_norm(state: LayerState, block: Block) -> LayerState:
    """A token is worth the more, the shorter its key: the score of kvpress's Knorm."""
    return state._replace(stream=extend(state.stream, nothing(block), pad=block.pad)._replace(score=-block.k.norm(dim=-1)))


def _prefills() -> list[Case]:
    model, eager = _model(), _model("eager")
    ids = torch.randint(0, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    policies = {
        "snapkv": snapkv(BUDGET, window=WINDOW),
        "h2o": h2o(BUDGET // 2, BUDGET - BUDGET // 2),
        "streaming": streaming(BUDGET),
        "knorm": Policy("knorm", _key_norm, BUDGET, when="prompt"),
    }
    found = [
        Case(f"prefill {LENGTH} + {name}", _compressed(model, ids, policy), lambda: _plain(model, ids), "plain prefill")
        for name, policy in policies.items()
    ]
    peers = {
        "snapkv": ("snapkv_press:SnapKVPress", model),
        "knorm": ("knorm_press:KnormPress", model),
        "h2o": ("observed_attention_press:ObservedAttentionPress", eager),
    }
    for name, (press, other) in peers.items():
        if (kind := kvpress(press)) is None:
            print(f"prefill {LENGTH} + {name}: left out, kvpress is not installed (pip install --no-deps kvpress)")
            continue
        options = {"window_size": WINDOW, "kernel_size": 7} if name == "snapkv" else {}
        peer = _pressed(other, ids, kind(compression_ratio=1 - BUDGET / LENGTH, **options))
        ours = _compressed(model, ids, policies[name])
        found.append(Case(f"prefill {LENGTH} + {name}", ours, peer, f"kvpress {kind.__name__}"))
    return found


def _attention() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 2048, 64, generator=generator) for heads in (9, 3, 3))
    flops = 2.0 * 9 * 64 * 2048 * 2049 / 2  # one product over the causal half

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    mass = Case(
        "column_mass torch 1x9x2048x64", lambda: column_mass(q, k, form="torch"), sdpa, "torch sdpa, no scores", flops
    )
    return [mass, *_decode(generator), *_packed(generator)]


def _decode(generator: torch.Generator) -> list[Case]:
    """The attention part of a step over the held tokens, over the 20 % that a policy leaves, and with the scores beside it."""
    from memlens.attention.exact import attend

    q = torch.randn(1, 9, 1, 64, generator=generator)
    full, few = ([torch.randn(1, 3, n, 64, generator=generator) for _ in "kv"] for n in (HELD, HELD // 5))

    def steps(kv):
        return lambda: [attend(q, *kv) for _ in range(DECODE)]

    def twice():
        for _ in range(DECODE):
            column_mass(q, few[0], lse=attend(q, *few, return_lse=True).lse)

    def once():
        for _ in range(DECODE):
            decode_observe(q, *few)

    return [
        Case(f"{DECODE} decode steps, {HELD // 5} of {HELD} held", steps(few), steps(full), f"all {HELD} held"),
        Case(f"{DECODE} decode_observe, {HELD // 5} held", once, twice, "attend, then column_mass with its lse"),
    ]


def _packed(generator: torch.Generator) -> list[Case]:
    """Ten steps of a layer on KIVI's 4 bits: read in place, against a copy made first, and against plain tokens."""
    from memlens.kv.store import HeldLayer

    k, v, new = (torch.randn(1, 3, n, 64, generator=generator) for n in (HELD, HELD, 1))
    q = torch.randn(1, 9, 1, 64, generator=generator)
    store = kivi(4)
    held = held_bytes(store.parts(store.commit(None, k, v)))
    share = sum(held.values()) / (2 * k.numel() * k.element_size())
    print(f"kivi 4 bit, {HELD} tokens: {share:.3f} of the float32 bytes, {held}")

    def steps(store: Kivi | None):
        start = HeldLayer(store)
        start.update(k, v)
        start.settle(None, torch.zeros(1, 3, HELD))

        def run():
            layer = copy(start)  # states are immutable: every call starts from the same
            for _ in range(10):
                kv = layer.update(new, new)
                layer.attend(q, *kv, mask=None, bias=None, scale=None)
                layer.settle(None, torch.zeros(1, 3, 0))

        return run

    name, plain = f"10 steps on kivi 4 bit, {HELD} held", steps(None)
    return [
        Case(name, steps(store), steps(store._replace(in_place=False)), "the same, dequantised first"),
        Case(name, steps(store), plain, "plain float32"),
    ]


def cases() -> list[Case]:
    """Scoring, compressed prefills, and decoding with less held."""
    return [*_attention(), *_prefills()]
