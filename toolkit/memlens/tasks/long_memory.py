"""Facts said once, a long stretch of small talk, then a question: does a stream still know?

chat = long_memory(tokenizer, generator=generator)
nll = ask_memory(model, chat, sirllm(start=4, entropy=76, recent=16), chunk=32)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.kv.adapter import PolicyCache
from memlens.kv.cache import continue_with
from memlens.kv.policies import Policy
from memlens.tasks.cache_probes import NAMES

__all__ = ["Chat", "ask_memory", "long_memory"]

TALK = (
    "I am fine, thank you. How are you today?",
    "The weather is nice today, I think.",
    "Yes, the weather is very nice today.",
    "Thank you, that is very kind of you.",
)


class Chat(NamedTuple):
    """Two facts, small talk, a question about the first fact, and its answer, as token ids."""

    facts: Tensor  # (1, n)
    talk: Tensor  # (1, m)
    question: Tensor  # (1, k), up to the code
    digits: Tensor  # (1, 4)


def long_memory(tokenizer: Any, *, talk: int = 400, generator: torch.Generator) -> Chat:
    """Two sentences "The code of river is 7320.", `talk` tokens of repetitive small talk, then "The code of river is ".

    Args:
        tokenizer: of the model; it must write each digit as a token.
        talk: tokens of small talk, at least 1; sentences are drawn from four.
    Raises:
        ValueError: no talk, or a tokenizer that joins digits.
    """
    check.at_least("long_memory", 1, talk=talk)
    names = [NAMES[i] for i in torch.randperm(len(NAMES), generator=generator)[:2].tolist()]
    codes = [f"{code:04d}" for code in torch.randint(0, 10_000, (2,), generator=generator).tolist()]
    lines = [f"The code of {name} is {code}" for name, code in zip(names, codes, strict=True)]
    asked = _ids(tokenizer, "\n" + lines[0])
    if tokenizer.decode(asked[0, -4:]) != codes[0]:
        check.fail("long_memory", f"the code becomes {asked[0, -4:].tolist()}", "a tokenizer with one token for each digit")
    picks = torch.randint(0, len(TALK), (talk,), generator=generator).tolist()
    chatter = _ids(tokenizer, " ".join(TALK[i] for i in picks))[:, :talk]
    return Chat(_ids(tokenizer, ".\n".join(lines) + ".\n"), chatter, asked[:, :-4], asked[:, -4:])


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


@torch.no_grad()
def ask_memory(model: Any, chat: Chat, policy: Policy | None = None, *, chunk: int = 32) -> Tensor:
    """The answer's negative log-likelihood after the chat went through the cache `chunk` tokens at a time: (4,) nats.

    The question comes in one forward after the talk, and the answer is teacher-forced.

    Raises:
        ValueError: a chunk below 1.
    """
    check.at_least("ask_memory", 1, chunk=chunk)
    cache = PolicyCache(model.config, policy)
    for part in torch.cat((chat.facts, chat.talk), 1).split(chunk, 1):
        continue_with(model, cache, part, keep=1)
    first = continue_with(model, cache, chat.question, keep=1)
    logits = torch.cat((first, continue_with(model, cache, chat.digits[:, :-1])), 1)
    return -logits.float().log_softmax(-1).gather(-1, chat.digits[..., None])[0, :, 0]
