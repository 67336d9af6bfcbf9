"""A small pre-norm decoder with pluggable mixers and feed-forwards, that trains in a minute on two cores.

    layers = [Layer(mixer=Attention, ffn=SwiGLU)] * 2
    model = TinyLM(layers, d=64, heads=4, vocab=256)

A mixer factory takes (d, heads), a feed-forward factory takes (d); what they make maps (batch, length, d) to the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlens import check
from memlens.attention.exact import attend
from memlens.attention.rope import frequencies, rope

__all__ = ["Attention", "Layer", "SwiGLU", "TinyLM", "load_checkpoint", "lm_loss", "save_checkpoint", "schedule", "train"]


class Layer(NamedTuple):
    mixer: Callable[[int, int], nn.Module]  # (d, heads) -> module
    ffn: Callable[[int], nn.Module] | None  # (d) -> module, or none


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); `hidden` defaults to 8/3 d, rounded up to a multiple of 16."""

    def __init__(self, d: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or math.ceil(8 * d / 3 / 16) * 16
        self.gate, self.up = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Causal softmax attention with rotary positions."""

    def __init__(self, d: int, heads: int, *, theta: float = 10_000.0):
        super().__init__()
        check.divides("Attention", heads=heads, d=d)
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.register_buffer("inv_freq", frequencies(d // heads, theta=theta), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        pos = torch.arange(x.shape[1], device=x.device)
        out = attend(rope(q, pos, self.inv_freq), rope(k, pos, self.inv_freq), v)
        return self.o(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, spec: Layer, d: int, heads: int):
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(d, eps=1e-6), spec.mixer(d, heads)
        self.ffn_norm = nn.RMSNorm(d, eps=1e-6) if spec.ffn else None
        self.ffn = spec.ffn(d) if spec.ffn else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x if self.ffn is None else x + self.ffn(self.ffn_norm(x))


class TinyLM(nn.Module):
    """Embedding, blocks, final norm, head. Linear and embedding weights start at normal(0, 0.02).

    A module with a method `reset(generator)` draws what else it has.

    Args:
        layers: one `Layer` per block.
        d, heads, vocab: widths; `tie` shares embedding and head.
        std: of the linear weights inside the blocks.
        generator: draws the weights; None uses torch's own.
    """

    def __init__(
        self, layers: Sequence[Layer], *, d: int, heads: int, vocab: int, tie: bool = False, std: float = 0.02, generator=None
    ):  # fmt: skip
        super().__init__()
        check.at_least("TinyLM", 1, d=d, heads=heads, vocab=vocab, layers=len(layers))
        self.embed = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(spec, d, heads) for spec in layers)
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.head = nn.Linear(d, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                outer = module is self.embed or module is self.head
                nn.init.normal_(module.weight, std=0.02 if outer else std, generator=generator)
            elif hasattr(module, "reset"):
                module.reset(generator)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, length, vocab) for token ids (batch, length)."""
        check.shapes("TinyLM", ids=(ids, "batch length"))
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per target; -100 is ignored. `targets` is already shifted: targets[t] is what logits[t] predicts."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def schedule(step: int, steps: int, *, warmup: int = 15, floor: float = 0.1) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, steps: int, lr: float = 3e-3, warmup: int = 15,
    optimizer: torch.optim.Optimizer | None = None, loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Train in place for `steps` of (ids, targets) and return the loss of every step, (steps,) float32 nats.

    `optimizer` (default AdamW, weight decay 0.1) keeps its groups' own peak rates; each is scaled by `schedule`.
    `loss(model, ids, targets)` replaces the plain next-token loss, e.g. to add a load-balance term.

    Raises:
        ValueError: if `batches` ends before `steps`.
    """
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    peaks = [group["lr"] for group in optimizer.param_groups]
    source, losses = iter(batches), []
    model.train()
    for step in range(steps):
        if (batch := next(source, None)) is None:
            check.fail("train", f"batches ended after {step}", f"{steps} batches", "pass an endless generator")
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps, warmup=warmup)
        value = loss(model, *batch) if loss else lm_loss(model(batch[0]), batch[1])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    model.eval()
    return torch.stack(losses).float()


def save_checkpoint(model: nn.Module, path: Path, **meta) -> None:
    """Write the weights as safetensors with `meta` (JSON) beside them in the header; an atomic rename."""
    from safetensors.torch import save_model

    path = Path(path)
    partial = path.with_suffix(".partial")
    save_model(model, str(partial), metadata={"memlens": json.dumps(meta, sort_keys=True)})
    partial.replace(path)


def load_checkpoint(model: nn.Module, path: Path) -> dict:
    """Fill `model` from a safetensors file and return the metadata it was saved with; nothing is unpickled.

    Raises:
        FileNotFoundError, or RuntimeError where names or shapes disagree.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    with safe_open(str(path), framework="pt") as file:
        meta = json.loads((file.metadata() or {}).get("memlens", "{}"))
    load_model(model, str(path))
    model.eval()
    return meta
