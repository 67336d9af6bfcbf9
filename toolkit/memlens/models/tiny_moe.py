"""A mixture-of-experts feed-forward for `TinyLM`, and small language models whose routers can be watched.

Six layers of width 96, a vocabulary of 4,096, about 2 million parameters. Each variant changes one thing, so that its
effect on routing can be read off: the load-balance pressure, a shared expert, k, or which layers are mixtures.

    model, vocab = tiny_moe("base")
    logits = model(vocab.encode(smollm2_ids))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlens import check
from memlens.data import cards
from memlens.models.tiny import Attention, Layer, SwiGLU, TinyLM, lm_loss, load_checkpoint
from memlens.routing.gate import Gate, load_balance, mix_experts, topk_gate

__all__ = ["SHIPPED", "VARIANTS", "MoE", "Variant", "Vocabulary", "balanced_loss", "build", "read_vocabulary", "tiny_moe"]

VOCAB = 4096
CONTEXT = 256
SHIPPED = ("base", "nolb", "overlb", "share1")


class Variant(NamedTuple):
    experts: int = 16  # routed
    top_k: int = 2
    hidden: int = 48  # neurons of one expert
    shared: int = 0  # experts that every token uses, outside the router
    balance: float = 0.01  # weight of the load-balance loss
    dense: tuple[int, ...] = ()  # layers with one SwiGLU as wide as the experts a token uses


VARIANTS = {
    "base": Variant(),
    "nolb": Variant(balance=0.0),
    "overlb": Variant(balance=0.3),
    "share1": Variant(experts=15, top_k=1, shared=1),
    "top4": Variant(top_k=4, hidden=24),
    "dense_first": Variant(dense=(0,)),
    "every2": Variant(dense=(0, 2, 4)),
}


class MoE(nn.Module):
    """SwiGLU experts behind a softmax router; maps (batch, length, d) to the same.

    All experts lie in three linears, expert e holding rows e*hidden..(e+1)*hidden of `gate` and `up` and the same
    columns of `down`, so running all of them with weight 1 is one dense SwiGLU. `shared` experts are a SwiGLU of
    their own. With one routed expert a token its raw probability is the weight. After a forward, `routed` holds the
    last (probabilities, Gate) for the load-balance loss.
    """

    def __init__(self, d: int, *, experts: int = 16, top_k: int = 2, hidden: int = 48, shared: int = 0):
        super().__init__()
        check.at_least("MoE", 1, d=d, experts=experts, hidden=hidden)
        check.within("MoE", 1, experts, top_k=top_k)
        self.num_experts, self.top_k = experts, top_k
        self.router = nn.Linear(d, experts, bias=False)
        self.gate, self.up = nn.Linear(d, experts * hidden, bias=False), nn.Linear(d, experts * hidden, bias=False)
        self.down = nn.Linear(experts * hidden, d, bias=False)
        self.shared = SwiGLU(d, shared * hidden) if shared else None
        self.routed: tuple[Tensor, Gate] | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        logits = self.router(flat)
        gate = topk_gate(logits, self.top_k, renormalize=self.top_k > 1)
        self.routed = (F.softmax(logits, dim=-1), gate)
        down = self.down.weight.unflatten(1, (self.num_experts, -1)).transpose(0, 1)
        w_gate, w_up = (linear.weight.unflatten(0, (self.num_experts, -1)) for linear in (self.gate, self.up))
        out = mix_experts(flat, gate, w_gate, w_up, down).view_as(x)
        return out if self.shared is None else out + self.shared(x)


def build(variant: str | Variant = "base", *, generator: torch.Generator | None = None) -> TinyLM:
    """An untrained tiny MoE language model: 6 layers, width 96, 4 heads, tied embeddings.

    Raises:
        ValueError: an unknown variant, naming the nearest.
    """
    if isinstance(variant, str):
        check.one_of("tiny_moe", VARIANTS, variant=variant)
        variant = VARIANTS[variant]
    experts = partial(MoE, experts=variant.experts, top_k=variant.top_k, hidden=variant.hidden, shared=variant.shared)
    dense = partial(SwiGLU, hidden=(variant.top_k + variant.shared) * variant.hidden)
    layers = [Layer(Attention, dense if i in variant.dense else experts) for i in range(6)]
    return TinyLM(layers, d=96, heads=4, vocab=VOCAB, tie=True, generator=generator)


class Vocabulary(NamedTuple):
    """The SmolLM2 token ids that a tiny model knows; every other one is the last id, `unknown`."""

    ids: Tensor  # (4095,) int64, increasing; the tiny id of a token is its place here

    @property
    def unknown(self) -> int:
        return len(self.ids)

    def encode(self, ids: Tensor) -> Tensor:
        """SmolLM2 ids, any shape, as tiny ids."""
        place = torch.searchsorted(self.ids, ids)
        known = self.ids[place.clamp(max=len(self.ids) - 1)] == ids
        return torch.where(known, place, self.unknown)

    def decode(self, ids: Tensor, unknown: int = 0) -> Tensor:
        """Tiny ids as SmolLM2 ids; `unknown` stands for what the vocabulary does not hold."""
        check.within("Vocabulary.decode", 0, self.unknown, ids=ids)
        return torch.cat((self.ids, self.ids.new_tensor([unknown])))[ids]


def read_vocabulary(content: str) -> Vocabulary:
    """A vocabulary from the text of `vocabulary.txt`: increasing SmolLM2 ids, one a line.

    Raises:
        ValueError: a wrong count, or ids that do not increase.
    """
    ids = torch.tensor([int(word) for word in content.split()])
    if len(ids) != VOCAB - 1 or bool((ids.diff() <= 0).any()):
        check.fail("read_vocabulary", f"{len(ids)} ids", f"{VOCAB - 1} increasing ids", "run datasets/tiny_moe/make.py")
    return Vocabulary(ids)


def tiny_moe(variant: str = "base") -> tuple[TinyLM, Vocabulary]:
    """A trained tiny MoE in evaluation mode, float32, and its vocabulary, from `datasets/tiny_moe`.

    Raises:
        ValueError: an unknown variant, or a file that is not what its card says.
        FileNotFoundError: a variant that is not shipped and was not made yet.
    """
    check.one_of("tiny_moe", VARIANTS, variant=variant)
    path = cards.root() / "tiny_moe" / f"{variant}.safetensors"
    if not path.is_file():
        check.fail("tiny_moe", f"no {path.name}", f"a checkpoint; shipped are {', '.join(SHIPPED)}",
                   f"run `python datasets/tiny_moe/make.py {variant}`", error=FileNotFoundError)  # fmt: skip
    cards.verified("tiny_moe", path.name)
    model = build(variant)
    load_checkpoint(model, path)
    return model, read_vocabulary(cards.verified("tiny_moe", "vocabulary.txt").decode())


def balanced_loss(weight: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A loss for `train`: next-token nats plus `weight` times the load-balance losses of the MoE layers, summed."""

    def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        value = lm_loss(model(ids), targets)
        routed = [module.routed for module in model.modules() if isinstance(module, MoE)]
        if not weight or not routed:
            return value
        return value + weight * torch.stack([load_balance(prob, gate.index) for prob, gate in routed]).sum()

    return loss
