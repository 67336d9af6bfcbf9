"""What the memory tests share: inputs of linear attention in its variants, and gradients of out and state."""

import torch
from torch.nn import functional as F

from memlens.memory.linear import LinearState

VARIANTS = {  # rule, decay ("", "head", "channel"), normalize
    "plain": ("add", "", False),
    "decay": ("add", "head", False),
    "channel": ("add", "channel", False),
    "normalized": ("add", "head", True),
    "delta": ("delta", "", False),
    "gated delta": ("delta", "head", False),
    "channel delta": ("delta", "channel", False),
}


def inputs(
    variant, length, *, generator, batch=2, heads=4, kv_heads=2, key_dim=12, value_dim=10, dtype=torch.float32, strong=False
):
    """(tensors, options): leaves by name, S and z included, and the keyword options of `linear_attention`."""
    rule, decay, normalize = VARIANTS[variant]

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (
        draw(batch, heads, length, key_dim),
        draw(batch, kv_heads, length, key_dim),
        draw(batch, kv_heads, length, value_dim),
    )
    leaves = {"q": q, "k": F.normalize(k, dim=-1), "v": v, "S": draw(batch, heads, key_dim, value_dim)}
    if normalize:  # positive weights, so that the quotient is tame
        leaves.update(q=q.exp(), k=leaves["k"].exp(), z=draw(batch, heads, key_dim).exp())
    if decay:
        shape = (batch, heads, length) if decay == "head" else (batch, heads, length, key_dim)
        leaves["log_decay"] = -(
            (torch.rand(shape, generator=generator, dtype=torch.float64) * (60 if strong else 1)) ** (3 if strong else 1)
        )
    if rule == "delta":
        leaves["beta"] = torch.rand(batch, heads, length, generator=generator, dtype=torch.float64)
    wide = {"S", "z", "log_decay", "beta"}
    leaves = {
        name: x.to(torch.promote_types(dtype, torch.float32) if name in wide else dtype).requires_grad_()
        for name, x in leaves.items()
    }
    return leaves, {"rule": rule, "normalize": normalize, "scale": 0.5}


def call(fn, leaves, options, **more):
    """fn over leaves by name, the state put together."""
    state = LinearState(leaves["S"], leaves.get("z"))
    named = {name: leaves[name] for name in ("log_decay", "beta") if name in leaves}
    return fn(leaves["q"], leaves["k"], leaves["v"], state=state, **named, **options, **more)


def results(fn, leaves, options, **more):
    """Out, last state, and the gradient of every leaf for fixed random gradients of out and last state."""
    out, state = call(fn, leaves, options, **more)
    parts = [out, *(x for x in state if x is not None)]
    seeded = torch.Generator().manual_seed(1)
    total = sum((part.double() * torch.randn(part.shape, generator=seeded, dtype=torch.float64)).sum() for part in parts)
    return [*parts, *torch.autograd.grad(total, list(leaves.values()))]
