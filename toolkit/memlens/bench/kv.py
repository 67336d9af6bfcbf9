"""Scores and compressed prefills against torch's attention without scores, a plain prefill and NVIDIA's kvpress.

The prefills run four layers of SmolLM2's widths with random weights: the cost of a layer is that of the real model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from memlens.bench.case import Case
from memlens.kv.policies import Policy, h2o, snapkv, streaming
from memlens.kv.score import column_mass

__all__ = ["cases", "kvpress"]

LENGTH, BUDGET, WINDOW = 1024, 205, 32
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


def _prefills() -> list[Case]:
    model, eager = _model(), _model("eager")
    ids = torch.randint(0, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    policies = {
        "snapkv": snapkv(BUDGET, window=WINDOW),
        "h2o": h2o(BUDGET // 2, BUDGET - BUDGET // 2),
        "streaming": streaming(BUDGET),
    }
    found = [
        Case(f"prefill {LENGTH} + {name}", _compressed(model, ids, policy), lambda: _plain(model, ids), "plain prefill")
        for name, policy in policies.items()
    ]
    peers = {
        "snapkv": ("snapkv_press:SnapKVPress", model),
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
    return [mass, _decode(generator)]


def _decode(generator: torch.Generator) -> Case:
    """The attention part of a step over 4,096 held tokens, and over the 20 % that a policy leaves."""
    from memlens.attention.exact import attend

    q = torch.randn(1, 9, 1, 64, generator=generator)
    full, few = ([torch.randn(1, 3, n, 64, generator=generator) for _ in "kv"] for n in (4096, 819))

    def steps(kv):
        return lambda: [attend(q, *kv) for _ in range(DECODE)]

    return Case(f"{DECODE} decode steps, 819 of 4096 held", steps(few), steps(full), "all 4096 held")


def cases() -> list[Case]:
    """Scoring, compressed prefills, and decoding with less held."""
    return [*_attention(), *_prefills()]
