"""The seven small models of the recall experiment: what they are made of, how they are trained, and their shipped weights.

model = load("based")          # trained by datasets/mqar/make.py
model = build("linear 8")      # fresh, for training it again
"""

from __future__ import annotations

import torch

from memlens import check
from memlens.data import cards
from memlens.memory.hybrid import MixerSpec
from memlens.models.mixers import mixer
from memlens.models.tiny import Layer, TinyLM, load_checkpoint, train
from memlens.tasks.mqar import mqar, mqar_batches, recall_accuracy

__all__ = ["ARMS", "PAIRS", "build", "evaluate", "file_of", "fit", "load"]

WIDTH, HEADS, VOCAB, LENGTH = 64, 1, 256, 128
PAIRS = (8, 16)
STD = WIDTH**-0.5  # of the first weights in the blocks: with 0.02 the arms need about twice the steps

_BASE = MixerSpec("softmax", WIDTH, HEADS, kernel=4)
_WINDOW = _BASE._replace(kind="window", window=16)
_LINEAR = {size: _BASE._replace(kind="linear", feature_dim=size) for size in (4, 8, 16)}
_MAMBA = _BASE._replace(kind="mamba", states=16)

ARMS: dict[str, list[MixerSpec]] = {
    "softmax": [_BASE, _BASE],
    "window 16": [_WINDOW, _WINDOW],
    "linear 4": [_LINEAR[4], _LINEAR[4]],
    "linear 8": [_LINEAR[8], _LINEAR[8]],
    "linear 16": [_LINEAR[16], _LINEAR[16]],
    "based": [_LINEAR[16], _WINDOW],
    "mamba 16": [_MAMBA, _MAMBA],
}


def build(arm: str, *, seed: int = 0) -> TinyLM:
    """A fresh model of one arm; its weights are drawn from `seed`.

    Raises:
        ValueError: an unknown arm, naming the nearest.
    """
    check.one_of("mqar.build", ARMS, arm=arm)
    layers = [Layer(mixer=mixer(spec), ffn=None) for spec in ARMS[arm]]
    return TinyLM(layers, d=WIDTH, heads=HEADS, vocab=VOCAB, std=STD, generator=torch.Generator().manual_seed(seed))


def fit(
    model: TinyLM, *, steps: int = 500, batch: int = 64, lr: float = 5e-3, pairs=PAIRS, length: int = LENGTH, seed: int = 1
) -> torch.Tensor:  # fmt: skip
    """Train on batches of `pairs` in turn, drawn from `seed`; returns the loss of each step, nats."""
    generator = torch.Generator().manual_seed(seed)
    batches = mqar_batches(batch, pairs=pairs, length=length, vocab=VOCAB, generator=generator)
    return train(model, batches, steps=steps, lr=lr)


@torch.no_grad()
def evaluate(model: TinyLM, *, pairs: int, count: int = 256, length: int = LENGTH, seed: int = 7) -> float:
    """Share of queries answered right on rows that no training seed drew."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = mqar(count, pairs=pairs, length=length, vocab=VOCAB, generator=generator)
    return recall_accuracy(model(tokens), targets)


def file_of(arm: str) -> str:
    """The name of an arm's weights in `datasets/mqar`."""
    check.one_of("mqar.file_of", ARMS, arm=arm)
    return f"{arm.replace(' ', '_')}.safetensors"


def load(arm: str) -> TinyLM:
    """The shipped model of one arm; its weights are float16 in the file and float32 here.

    Raises:
        ValueError: an unknown arm, or a file that is not the one its card lists; FileNotFoundError where there is none.
    """
    model = build(arm)
    cards.verified("mqar", file_of(arm))
    load_checkpoint(model, cards.root() / "mqar" / file_of(arm))
    return model
