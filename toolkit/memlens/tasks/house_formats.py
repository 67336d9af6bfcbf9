"""Requests whose right answer is a matter of house rules: nobody who has not seen an example can know the format.

Four families: dates, logins, orders and tags. The large model of a serving system is played by a function that knows the
rules; the small one is a real language model that has to read them off the examples in its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from memlens import check

__all__ = ["FAMILIES", "Request", "complete", "house_requests"]

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
FIRST = ("Clara", "Nora", "Felix", "Hugo", "Martha", "Simon", "Walter", "Greta", "Oscar", "Judith", "Peter", "Irene")
LAST = (
    "Bennett",
    "Foster",
    "Marlow",
    "Hayes",
    "Porter",
    "Quinn",
    "Sutton",
    "Weaver",
    "Abbott",
    "Carver",
    "Dalton",
    "Ellis",
)
THINGS = ("lamps", "chairs", "ropes", "kettles", "mirrors", "ladders", "baskets", "shovels", "blankets", "candles")
TOPICS = ("river", "stone", "garden", "bridge", "winter", "harbour", "forest", "market", "island", "railway")
FAMILIES = ("dates", "logins", "orders", "tags")


class Request(NamedTuple):
    family: str
    text: str
    answer: str  # in house format


def house_requests(family: str, count: int, *, generator: torch.Generator) -> list[Request]:
    """`count` different requests of one family, with their answers.

    Raises:
        ValueError: an unknown family, or more requests than a family has (100 tags).
    """
    check.one_of("house_requests", FAMILIES, family=family)
    check.within("house_requests", 0, 90, count=count)
    found: dict[str, Request] = {}
    while len(found) < count:
        text, answer = _draw(family, generator)
        found.setdefault(text, Request(family, text, answer))
    return list(found.values())


def _draw(family: str, generator: torch.Generator) -> tuple[str, str]:
    def pick(words: Sequence[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    if family == "dates":
        day, month, year = number(1, 29), pick(MONTHS), number(1950, 2025)
        return f"Write the date {month} {day}, {year} in our format.", f"[{day}/{month[:3].upper()}/{year}]"
    if family == "logins":
        first, last = pick(FIRST), pick(LAST)
        return f"Make a login for {first} {last}.", f"{last.lower()}.{first.lower()}@staff"
    if family == "orders":
        count, thing, first = number(2, 60), pick(THINGS), pick(FIRST)
        return f"Record that {first} ordered {count} {thing}.", f"ORDER|{first}|{thing}|{count}"
    one, two = pick(TOPICS), pick(TOPICS)
    return f"Tag the article about the {one} and the {two}.", f"#{one} #{two} #article"


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int = 20) -> list[str]:
    """The first line that the model writes greedily after each prompt, as one padded batch.

    Raises:
        ValueError: no prompts, or a single string.
    """
    if isinstance(prompts, str) or not prompts:
        check.fail("complete", "no list of prompts", "at least one prompt")
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        batch = tokenizer(list(prompts), padding=True, return_tensors="pt", add_special_tokens=False)
    finally:
        tokenizer.padding_side = side
    stop = [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False).input_ids]
    ids = model.generate(
        **batch, max_new_tokens=tokens, do_sample=False, eos_token_id=stop, pad_token_id=tokenizer.eos_token_id
    )
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]
