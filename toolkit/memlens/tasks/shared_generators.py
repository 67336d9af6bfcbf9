"""Contexts with several questions, drawn from a seed: string retrieval, statistics, rules and facts in prose.

    kv             lines of random "key: value"; a key is asked
    prefix_suffix  a list of words; the one with a given beginning and end
    vt             chains of assignments X1 = 4711, X2 = X1; all names that are equal to a number
    many_shot      examples that a random rule labels; a new one
    mf             a list of integers; the largest, the smallest, the median and their neighbours
    needles        several facts in prose; one is asked
    codes          `memlens.tasks.cache_probes.code_lookup` as an item

A context fills `length` tokens as far as whole lines do. Answers that are looked up stand in it exactly once. Source: the tasks
of SCBench, arXiv:2412.10319, section 3, written anew for 300 to 2,000 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch

from memlens import check, data
from memlens.tasks.cache_probes import NAMES, code_lookup

__all__ = ["GENERATORS", "Item", "Turn", "codes", "kv", "many_shot", "mf", "needles", "prefix_suffix", "vt"]

LABELS, WORDS = ("A", "B", "C"), 8  # of many_shot: labels, and words that the rule maps to them
MIXED, CHAIN = 5, 4  # of vt: chains that run side by side, and the names of each


class Turn(NamedTuple):
    input: str
    answer: str


class Item(NamedTuple):
    task: str
    context: str
    multi_turns: tuple[Turn, ...]
    close: str = "\n"  # what ends an answer


def codes(tokenizer: Any, *, length: int = 312, turns: int = 5, generator: torch.Generator) -> Item:
    """Lines "The code of apple is 4821." of twelve tokens; a code is asked. At most 38 lines."""
    made = code_lookup(tokenizer, items=_room("codes", length, turns) // 12, questions=turns, generator=generator)
    asked = (
        Turn(tokenizer.decode(q), tokenizer.decode(digits)) for q, digits in zip(made.questions, made.digits, strict=True)
    )
    return Item("codes", tokenizer.decode(made.context[0]), tuple(asked), ".\n")


def kv(tokenizer: Any, *, length: int = 400, turns: int = 5, generator: torch.Generator) -> Item:
    """Lines "apple river: 4821"; a key is asked."""
    lines = [f"{a} {b}: {n}\n" for (a, b), n in zip(_pairs(generator), _numbers(generator), strict=False)]
    kept = _fill(tokenizer, lines, _room("kv", length, turns))
    asked = (kept[i].rstrip("\n").split(": ") for i in _draw(len(kept), turns, generator))
    return Item("kv", "".join(kept), tuple(Turn(f"{key}: ", value) for key, value in asked))


def prefix_suffix(tokenizer: Any, *, length: int = 400, turns: int = 5, generator: torch.Generator) -> Item:
    """Words of three parts, "apple-stone-river"; the one that begins with apple and ends with river."""
    middles = torch.randint(len(NAMES), (len(NAMES) ** 2,), generator=generator).tolist()
    lines = [f"- {a}-{NAMES[i]}-{b}\n" for (a, b), i in zip(_pairs(generator), middles, strict=False)]
    kept = _fill(tokenizer, lines, _room("prefix_suffix", length, turns))
    words = [kept[i][1:-1] for i in _draw(len(kept), turns, generator)]
    ends = [(word[1:].split("-")[0], word.split("-")[-1]) for word in words]
    asked = (Turn(f"Begins with {a}, ends with {b}:", word) for word, (a, b) in zip(words, ends, strict=True))
    return Item("prefix_suffix", "".join(kept), tuple(asked))


def vt(tokenizer: Any, *, length: int = 400, turns: int = 5, generator: torch.Generator) -> Item:
    """Chains of up to four assignments, "X17 = 4711", "X3 = X17", five at a time mixed; all names of a chain, in their order."""
    room, values = _room("vt", length, turns), _numbers(generator)
    names = (f"X{i}" for i in _draw(1000, 1000, generator))
    lines, chains = [], {}
    for _ in range(1000 // (MIXED * CHAIN)):
        block = list(islice(values, MIXED))
        steps = torch.randperm(MIXED * CHAIN, generator=generator) % MIXED
        for value in (block[i] for i in steps.tolist()):
            chain = chains.setdefault(value, [])
            chain.append(next(names))
            lines.append(f"{chain[-1]} = {chain[-2] if len(chain) > 1 else value}\n")
    kept = _fill(tokenizer, lines, room)
    there = {line.split()[0] for line in kept}
    shown = [value for value, chain in chains.items() if chain[0] in there]
    picked = [shown[i] for i in _draw(len(shown), turns, generator)]
    answers = [", ".join(name for name in chains[value] if name in there) for value in picked]
    asked = (Turn(f"Equal to {value}:", f" {answer}") for value, answer in zip(picked, answers, strict=True))
    return Item("vt", "".join(kept), tuple(asked))


def many_shot(tokenizer: Any, *, length: int = 400, turns: int = 5, generator: torch.Generator) -> Item:
    """Examples "river 4821 -> B", where a random rule gives each of eight words a label; a new example."""
    words = [NAMES[i] for i in _draw(len(NAMES), WORDS, generator)]
    rule = {word: LABELS[i % len(LABELS)] for word, i in zip(words, _draw(WORDS, WORDS, generator), strict=True)}
    numbers = list(_numbers(generator))
    picks = torch.randint(WORDS, (len(numbers),), generator=generator).tolist()
    first = [*range(WORDS), *picks]  # every word is shown
    examples = [(words[i], n) for i, n in zip(first, numbers, strict=False)]
    kept = _fill(tokenizer, [f"{w} {n} -> {rule[w]}\n" for w, n in examples], _room("many_shot", length, turns))
    check.at_least("many_shot", WORDS, f"one for each of {WORDS} words", examples=len(kept))
    new = examples[len(kept) : len(kept) + turns]
    return Item("many_shot", "".join(kept), tuple(Turn(f"{w} {n} ->", f" {rule[w]}") for w, n in new))


def mf(tokenizer: Any, *, length: int = 400, turns: int = 5, generator: torch.Generator) -> Item:
    """Different integers of four digits, an odd number of them; at most five statistics."""
    check.within("mf", 1, 5, turns=turns)
    kept = _fill(tokenizer, [f"{n}\n" for n in _numbers(generator)], _room("mf", length, turns))
    kept = kept[: len(kept) - 1 + len(kept) % 2]
    order = sorted(line.strip() for line in kept)
    places = {"largest": -1, "smallest": 0, "median": len(order) // 2, "second largest": -2, "second smallest": 1}
    asked = tuple(Turn(f"The {name} number is ", order[place]) for name, place in places.items())
    return Item("mf", "".join(kept), asked[:turns])


def needles(
    tokenizer: Any, *, length: int = 600, turns: int = 5, generator: torch.Generator, text: str = "areopagitica"
) -> Item:
    """A fact for each turn, "The code of river is 7320.", between the sentences of a shipped text; one is asked."""
    names = [NAMES[i] for i in _draw(len(NAMES), turns, generator)]
    facts = [f"The code of {name} is {n}." for name, n in zip(names, _numbers(generator), strict=False)]
    begin = int(torch.randint(20_000, (1,), generator=generator))
    prose = " ".join(data.text(text, start=begin, length=40_000).split())
    parts = re.split(r"(?<=[.!?]) ", prose)[1:-1]
    sentences = [f"{part} " for part in parts if len(part.split()) <= 40 and not re.search(r"\d", part)]
    kept = _fill(tokenizer, sentences, _room("needles", length, turns) - 12 * turns)
    for fact, place in zip(facts, sorted(_draw(len(kept), turns, generator), reverse=True), strict=True):
        kept.insert(place, f"{fact} ")
    asked = (Turn(fact[:-5], fact[-5:-1]) for fact in (facts[i] for i in _draw(turns, turns, generator)))
    return Item("needles", "".join(kept).rstrip() + "\n", tuple(asked), ".\n")


GENERATORS: dict[str, Callable[..., Item]] = {
    make.__name__: make for make in (codes, kv, prefix_suffix, vt, many_shot, mf, needles)
}


def _room(op: str, length: int, turns: int) -> int:
    check.at_least(op, 1, turns=turns)
    check.at_least(op, 32 * turns, f"room for {turns} turns", length=length)
    return length


def _fill(tokenizer: Any, lines: Iterable[str], room: int) -> list[str]:
    """The first lines that fit into `room` tokens."""
    kept = []
    for line in lines:
        room -= len(tokenizer(line, add_special_tokens=False)["input_ids"])
        if room < 0:
            break
        kept.append(line)
    return kept


def _draw(count: int, many: int, generator: torch.Generator) -> list[int]:
    """`many` different numbers below count, in random order."""
    check.within("shared_context", 1, count, drawn=many)
    return torch.randperm(count, generator=generator)[:many].tolist()


def _pairs(generator: torch.Generator) -> Iterable[tuple[str, str]]:
    """Every pair of two different names, once."""
    size = len(NAMES)
    every = (divmod(i, size) for i in torch.randperm(size * size, generator=generator).tolist())
    return ((NAMES[a], NAMES[b]) for a, b in every if a != b)


def _numbers(generator: torch.Generator) -> Iterable[str]:
    """Every number of four digits, once."""
    return (str(1000 + i) for i in torch.randperm(9000, generator=generator).tolist())
