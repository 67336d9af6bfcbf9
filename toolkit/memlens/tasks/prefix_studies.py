"""The experiments behind the notebook on shared prefixes and `datasets/kv_prefix`: prompts, a real model, mixes, random trees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens import check, data
from memlens.cost.serving.batching import Request
from memlens.kv.adapter import PolicyCache
from memlens.kv.cache import continue_with
from memlens.kv.shared import share_prefix

__all__ = [
    "GROUPS", "MEMBERS", "Served", "brute_force", "common", "greedy", "mix", "prompts", "random_prompts", "serve_alone",
    "serve_together",
]  # fmt: skip

GROUPS, MEMBERS, PREFIX, OWN, NEW = 4, 8, 400, 24, 8  # 32 prompts; tokens of each part
SOURCES = ("paradise_lost", "hamlet", "areopagitica", "paradise_lost")


class Served(NamedTuple):
    written: Tensor  # (members, NEW) token ids
    prefill_tokens: int
    prefill_seconds: float  # CPU time of this process
    next_logits: Tensor  # (members, V) after the prompt


def prompts(tokenizer: Any, group: int) -> tuple[Tensor, Tensor]:
    """A group's prefix (1, PREFIX) and its members' own parts (MEMBERS, OWN), cut from plays and Milton."""
    check.within("prompts", 0, GROUPS - 1, group=group)
    start = 2000 + 3000 * group
    prefix = data.text(SOURCES[group], start=start, length=PREFIX, tokenizer=tokenizer)
    others = data.text("hamlet", start=start + 1000, length=MEMBERS * OWN, tokenizer=tokenizer)
    return prefix, others.view(MEMBERS, OWN)


@torch.no_grad()
def serve_alone(model: Any, prefix: Tensor, own: Tensor, *, new: int = NEW) -> Served:
    """Every member reads the whole prompt, one batch; then `new` tokens are written greedily."""
    whole = torch.cat((prefix.expand(len(own), -1), own), 1)
    start = time.process_time()
    out = model(whole, use_cache=True, logits_to_keep=1)
    seconds = time.process_time() - start
    return Served(greedy(model, out, new), whole.numel(), seconds, out.logits[:, -1])


@torch.no_grad()
def serve_together(model: Any, prefix: Tensor, own: Tensor, *, new: int = NEW) -> Served:
    """The prefix is read once and held once; members read what is theirs, and write behind the shared prefix."""
    start = time.process_time()
    cache = PolicyCache(model.config)
    continue_with(model, cache, prefix, keep=1)
    group = share_prefix(cache, len(own))
    with group.on(model):
        out = model(own, past_key_values=group, use_cache=True, logits_to_keep=1)
        seconds = time.process_time() - start
        return Served(greedy(model, out, new), prefix.numel() + own.numel(), seconds, out.logits[:, -1])


@torch.no_grad()
def greedy(model: Any, out: Any, new: int) -> Tensor:
    """The next `new` tokens (B, new) after a forward, each the likeliest."""
    written = [out.logits[:, -1:].argmax(-1)]
    while len(written) < new:
        out = model(written[-1], past_key_values=out.past_key_values, use_cache=True)
        written.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(written, 1)


def mix(
    generator: torch.Generator, *, requests: int = 800, families: int = 100, output: tuple[int, int] = (100, 200)
) -> list[Request]:
    """A batch in random order: families share 200 to 800 tokens, half a family up to 100 more, then 50 to 200 of one's own.

    Args:
        output: fewest and most tokens that a request writes.
    """
    check.at_least("mix", 1, requests=requests, families=families)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1000, (count,), generator=generator).tolist())

    heads = [tokens(draw(200, 800)) for _ in range(families)]
    halves = [head + tokens(draw(0, 100)) for head in heads for _ in range(2)]
    return [Request(halves[draw(0, len(halves) - 1)] + tokens(draw(50, 200)), draw(*output)) for _ in range(requests)]


def random_prompts(generator: torch.Generator, *, most: int = 8, length: int = 9, alphabet: int = 2) -> list[list[int]]:
    """1 to `most` short prompts over a small alphabet, so that they share a lot."""
    count = int(torch.randint(1, most + 1, (), generator=generator))
    lengths = torch.randint(1, length + 1, (count,), generator=generator).tolist()
    return [torch.randint(alphabet, (n,), generator=generator).tolist() for n in lengths]


def common(prompts: list[list[int]]) -> int:
    """Tokens that all of them begin with."""
    place = 0
    for column in zip(*prompts, strict=False):
        if len(set(column)) > 1:
            break
        place += 1
    return place


def brute_force(prompts: list[list[int]]) -> int:
    """The most tokens that any grouping saves, over all ways to split the prompts into groups (at most 9 of them)."""
    check.within("brute_force", 1, 9, prompts=len(prompts))
    return max(
        sum((len(group) - 1) * common([prompts[i] for i in group]) for group in split)
        for split in _splits(list(range(len(prompts))))
    )


def _splits(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for split in _splits(rest):
        yield [[first], *split]
        for place in range(len(split)):
            yield [*split[:place], [first, *split[place]], *split[place + 1 :]]
