"""Train the recall models of `memlens.models.mqar` and write their weights: `python datasets/mqar/make.py [ARM ...]`.

Every arm gets the same 500 batches and one thread; about a minute each, the Mamba arm several. Then rewrite the card's hashes with
`python -m memlens.data.cards mqar`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from memlens.models.mqar import ARMS, PAIRS, build, evaluate, file_of, fit
from memlens.models.tiny import save_checkpoint

STEPS, BATCH, RATE = 500, 64, 5e-3


def main(arms: list[str]) -> None:
    torch.set_num_threads(1)
    here = Path(__file__).parent
    for arm in arms or list(ARMS):
        model, start = build(arm), time.process_time()
        losses = fit(model, steps=STEPS, batch=BATCH, lr=RATE)
        seconds = time.process_time() - start
        save_checkpoint(model.half(), here / file_of(arm), arm=arm, steps=STEPS, batch=BATCH, lr=RATE)
        right = {pairs: round(evaluate(model.float(), pairs=pairs), 3) for pairs in PAIRS}
        print(f"{arm}: loss {losses[-20:].mean():.3f}, right by pairs {right}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
