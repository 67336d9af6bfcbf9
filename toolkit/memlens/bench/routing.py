"""Routing: consistency and caches against their step-by-step references, experts against transformers'."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch

from memlens.bench.case import Case

__all__ = ["cases"]

EXPERTS, TOKENS, TOP_K, BATCH, WINDOW = 64, 512, 8, 16, 16
CAPACITY = 2 * TOP_K


def cases() -> list[Case]:
    """SRP and hit curves at 64 experts, 512 tokens, k = 8, batch 16; and one MoE feed-forward of 8,192 tokens."""
    from memlens.routing.caching import hit_curve, simulate
    from memlens.routing.consistency import srp
    from memlens.routing.trace import RoutingTrace

    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(BATCH, TOKENS, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    trace = RoutingTrace(chosen[:, :, None], None, None, EXPERTS, TOP_K, (0,))
    size = f"{BATCH}x{TOKENS} {TOP_K} of {EXPERTS}"
    found = [
        Case(
            f"srp m={WINDOW} {size}",
            partial(srp, trace, WINDOW),
            partial(srp, trace, WINDOW, form="reference"),
            "our reference",
        )
    ]
    for policy in ("segment", "lru", "belady"):
        future = WINDOW if policy == "segment" else None
        curve = partial(hit_curve, chosen, EXPERTS, policy, future=future)
        one = partial(simulate, chosen, EXPERTS, CAPACITY, policy, future=future)
        found.append(Case(f"hit_curve {policy} {size}", curve, one, f"our simulator, 1 of {EXPERTS} capacities"))
    return found + _experts(generator)


def _experts(generator: torch.Generator) -> list[Case]:
    from memlens.routing.gate import mix_experts, topk_gate

    if find_spec("transformers") is None:
        print("mix_experts left out: transformers is not installed")
        return []
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    tokens, dim, hidden, experts, k = 8192, 96, 48, 16, 2
    config = MixtralConfig(hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = "eager"
    peer = MixtralExperts(config).requires_grad_(False)
    for weight in peer.parameters():
        torch.nn.init.normal_(weight, std=0.05, generator=generator)
    x, logits = torch.randn(tokens, dim, generator=generator), torch.randn(tokens, experts, generator=generator)
    gate = topk_gate(logits, k)
    w_gate, w_up = peer.gate_up_proj.chunk(2, dim=1)
    ours = partial(mix_experts, x, gate, w_gate, w_up, peer.down_proj)
    flops = 6.0 * tokens * k * dim * hidden
    return [
        Case(
            f"mix_experts {tokens}x{dim} {k} of {experts}",
            ours,
            partial(peer, x, gate.index, gate.weight),
            "transformers MixtralExperts",
            flops,
        )
    ]
