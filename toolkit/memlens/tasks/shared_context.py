"""One context, several questions: a cache that was compressed for the first may fail the second.

    item = encode(tokenizer, GENERATORS["kv"](tokenizer, length=400, generator=generator))
    data = evaluate_shared(model, Method("SnapKV", lambda held: snapkv(held * 2 // 5)), item, "multi-turn")
    data.right                                          # (method, task, mode, turn), share of the answer's tokens

An item is a context and its turns, each an input and an answer. Two modes share the context's cache between the questions:

    multi-turn      one session: the cache is compressed once the first question was read, and a turn sees the context, the
                    earlier questions and their reference answers
    multi-request   the cache is compressed before any question, and each question goes to a copy of it alone

Answers are teacher-forced; with a tokenizer they are also written greedily and scored as text. Source: SCBench,
arXiv:2412.10319, section 3; items are those of `memlens.tasks.shared_generators`, small enough for a small model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor

from memlens import check
from memlens.kv.cache import PolicyCache, Prefilled, compress, continue_with, prefill
from memlens.kv.policies import Policy
from memlens.tasks.shared_generators import GENERATORS, Item, Turn

__all__ = [
    "GENERATORS", "MODES", "SCORERS", "Encoded", "Item", "Method", "Reading", "Turn", "begin", "encode", "evaluate_shared",
    "exact_match", "f1", "read", "substring",
]  # fmt: skip

MODES = ("multi-turn", "multi-request")
DIMS = ("method", "task", "mode", "turn")


# --- scorers of written answers: (answer, reference) -> [0, 1] -----------------------------------------------------


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same words in the same order, case and punctuation aside."""
    return float(_words(answer) == _words(reference))


def substring(answer: str, reference: str) -> float:
    """1 where the reference's words stand together somewhere in the answer; a reference without words is in every answer."""
    said, wanted = _words(answer), _words(reference)
    return float(any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1)))


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words, each counted as often as it stands there."""
    said, wanted = Counter(_words(answer)), Counter(_words(reference))
    both = (said & wanted).total()
    if not said or not wanted:
        return float(said == wanted)
    return 2 * both / (said.total() + wanted.total())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


SCORERS: dict[str, Callable[[str, str], float]] = {
    "codes": exact_match, "kv": exact_match, "prefix_suffix": exact_match, "vt": f1, "many_shot": exact_match,
    "mf": exact_match, "needles": substring,
}  # fmt: skip


# --- items as tokens -----------------------------------------------------------------------------------------------


class Question(NamedTuple):
    input: Tensor  # (1, n) int64
    answer: Tensor  # (1, m)


class Encoded(NamedTuple):
    """An item as token ids; its parts are tokenised one by one, so a prompt is their concatenation."""

    task: str
    context: Tensor  # (1, L)
    multi_turns: tuple[Question, ...]
    close: Tensor  # (1, c), after an answer


class Method(NamedTuple):
    name: str
    policy: Callable[[int], Policy]  # given the tokens that it compresses


class Reading(NamedTuple):
    """The full cache of a context, and of the context with the first question: what all methods compress."""

    context: Prefilled
    first: Prefilled


def encode(tokenizer: Any, item: Item) -> Encoded:
    """The item as token ids.

    Raises:
        ValueError: a part without tokens, or no turn.
    """

    def ids(text: str) -> Tensor:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        check.at_least("encode", 1, f"{item.task}: {text!r} has none", tokens=len(found))
        return torch.tensor([found])

    check.at_least("encode", 1, turns=len(item.multi_turns))
    turns = tuple(Question(ids(turn.input), ids(turn.answer)) for turn in item.multi_turns)
    return Encoded(item.task, ids(item.context), turns, ids(item.close))


@torch.no_grad()
def read(model: Any, item: Encoded, context: Prefilled | None = None) -> Reading:
    """Prefill the context, and then the first question on a copy; both with their queries, for `compress`.

    `context` is its prefill where that was done already, for other questions about it.
    """
    context = context or prefill(model, item.context, keep_queries=True)
    cache = context.cache.fork()
    recorded = cache.record()
    logits = continue_with(model, cache, item.multi_turns[0].input, keep=1)[:, -1]
    queries = [torch.cat((old, *new), 2) for old, new in zip(context.queries, recorded, strict=True)]
    cache.record(False)
    return Reading(context, Prefilled(logits, cache, queries))


# --- the evaluation ------------------------------------------------------------------------------------------------


@torch.no_grad()
def begin(
    model: Any, method: Method, item: Encoded, mode: str, reading: Reading | None = None
) -> tuple[Tensor, PolicyCache]:
    """(logits (1, V) after the newest token, the compressed cache): of the context, or of it with the first question."""
    check.one_of("evaluate_shared", MODES, mode=mode)
    ids = item.context if mode == "multi-request" else torch.cat((item.context, item.multi_turns[0].input), 1)
    policy = method.policy(ids.shape[1])
    if policy.hears:  # its score comes from the logits of a forward
        return prefill(model, ids, policy)[:2]
    reading = reading or read(model, item)
    filled = reading.context if mode == "multi-request" else reading.first
    return filled.logits, compress(filled, policy)


@torch.no_grad()
def evaluate_shared(
    model: Any, method: Method, item: Encoded, mode: str, *, reading: Reading | None = None, tokenizer: Any = None
) -> xr.Dataset:
    """How each turn's answer fares, every variable (method, task, mode, turn).

    `nll`: the answer's negative log-likelihood, nats per token, teacher-forced. `right`: share of its tokens that would be
    chosen. `exact`: whether all are, which is when greedy decoding writes it. With a tokenizer also `score`: the task's
    scorer on as many greedily written tokens as the answer has.

    Args:
        mode: "multi-turn" or "multi-request".
        reading: of this item, so that many methods share one prefill.
    Raises:
        ValueError: an unknown mode or, with a tokenizer, a task without a scorer; what the policy refuses.
    """
    if tokenizer is not None:
        check.one_of("evaluate_shared", SCORERS, task=item.task)
    last, cache = begin(model, method, item, mode, reading)
    session = mode == "multi-turn"
    walk = _session(model, cache, last[:, None], item) if session else _requests(model, cache, item, tokenizer is not None)
    rows: dict[str, list[float]] = {"nll": [], "right": [], "exact": []} | ({"score": []} if tokenizer else {})
    for (_, answer), (state, first, logits) in zip(item.multi_turns, walk, strict=True):
        right = logits.argmax(-1) == answer
        nll = -logits.float().log_softmax(-1).gather(-1, answer[..., None])
        for name, value in (("nll", nll.mean()), ("right", right.float().mean()), ("exact", right.all())):
            rows[name].append(float(value))
        if tokenizer:
            said = tokenizer.decode(_write(model, state, first, answer.shape[1])[0])
            rows["score"].append(SCORERS[item.task](said, tokenizer.decode(answer[0])))
    return _labelled(rows, method.name, item, mode)


Step = tuple[PolicyCache, Tensor, Tensor]  # a cache that has read the question, the logits after it, those of the answer


def _session(model: Any, cache: PolicyCache, last: Tensor, item: Encoded) -> Iterator[Step]:
    """Turn after turn on one cache; an answer is scored in the forward that reads it with the next question."""
    for (_, answer), later in zip_longest(item.multi_turns, item.multi_turns[1:]):
        before, first = cache.fork(), last
        part = torch.cat((answer, item.close, later.input), 1) if later else answer
        out = continue_with(model, cache, part)
        logits, last = torch.cat((first, out[:, : answer.shape[1] - 1]), 1), out[:, -1:]
        yield before, first, logits


def _requests(model: Any, cache: PolicyCache, item: Encoded, writes: bool) -> Iterator[Step]:
    """Each question on a copy of the cache, in one forward with its answer."""
    for asked, answer in item.multi_turns:
        before = cache.fork()
        if writes:
            continue_with(model, before, asked, keep=1)
        logits = continue_with(model, cache.fork(), torch.cat((asked, answer[:, :-1]), 1))[:, asked.shape[1] - 1 :]
        yield before, logits[:, :1], logits


def _write(model: Any, cache: PolicyCache, first: Tensor, count: int) -> Tensor:
    """`count` tokens decoded greedily, (1, count); `first` (1, 1, V) are the logits of the first."""
    ids = [first.argmax(-1)]
    for _ in range(count - 1):
        ids.append(continue_with(model, cache, ids[-1], keep=1).argmax(-1))
    return torch.cat(ids, 1)


def _labelled(rows: dict[str, list[float]], method: str, item: Encoded, mode: str) -> xr.Dataset:
    coords = {"method": [method], "task": [item.task], "mode": [mode], "turn": range(1, len(item.multi_turns) + 1)}
    data = xr.Dataset({name: (DIMS, [[[values]]]) for name, values in rows.items()}, coords)
    data.nll.attrs = {"long_name": "answer's negative log-likelihood", "units": "nats per token"}
    data.right.attrs = {"long_name": "answer's tokens right", "units": ""}
    data.exact.attrs = {"long_name": "answers that greedy decoding writes", "units": ""}
    return data
