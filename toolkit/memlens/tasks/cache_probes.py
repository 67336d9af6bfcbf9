"""What a compressed KV cache still knows: a continuation's distribution, a passage to copy, codes to look up.

    natural_kl    KL(full || compressed) of the next-token distributions on a natural continuation; the sharpest of them
    copy_recall   the beginning of a span comes again; how well does its continuation follow?
    code_lookup   lines "The code of apple is 4821.", then one of them up to the code; are the digits known?

Each feeds the real path: a prompt is prefilled, a policy compresses it, the rest continues on what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor

from memlens import check
from memlens.kv.cache import PolicyCache, Prefilled, compress, continue_with, prefill, stream_eval
from memlens.kv.policies import Policy

__all__ = ["Lookup", "ask_codes", "code_lookup", "copy_recall", "kl_divergence", "natural_kl", "sparsity", "stream_kl"]

NAMES = (
    "apple", "river", "stone", "window", "garden", "horse", "bread", "silver", "winter", "table", "music", "paper",
    "ocean", "tiger", "candle", "mirror", "forest", "bridge", "doctor", "engine", "flower", "guitar", "hammer",
    "island", "jacket", "kitchen", "ladder", "market", "needle", "orange", "pencil", "queen", "rocket", "shadow",
    "temple", "valley", "wagon", "copper", "dragon",
)  # fmt: skip


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) over the last axis of two logits, nats, float32; at least 0."""
    p, q = full.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0)


def natural_kl(model: Any, ids: Tensor, prompt: int, policies: Mapping[str, Policy]) -> xr.DataArray:
    """KL(full || compressed) of the next-token distribution after each token of the continuation, (method, token) nats.

    The prompt is prefilled once; each policy compresses it, and the continuation follows in one forward.

    Args:
        ids: (1, L), of which the first `prompt` tokens are compressed.
    Raises:
        ValueError: no continuation, or no policy.
    """
    check.shapes("natural_kl", ids=(ids, "1 length"))
    check.within("natural_kl", 1, ids.shape[1] - 1, prompt=prompt)
    check.at_least("natural_kl", 1, policies=len(policies))
    filled, rest = prefill(model, ids[:, :prompt], keep_queries=True), ids[:, prompt:]
    full = continue_with(model, filled.cache.fork(), rest)
    rows = [kl_divergence(full, continue_with(model, compress(filled, policy), rest))[0] for policy in policies.values()]
    return _labelled(torch.stack(rows), list(policies), prompt)


def stream_kl(model: Any, ids: Tensor, policies: Mapping[str, Policy], *, chunk: int, start: int) -> xr.DataArray:
    """KL(full || streamed), (method, token) nats, when the text is fed `chunk` tokens at a time and evicted as it goes."""
    check.shapes("stream_kl", ids=(ids, "1 length"))
    full = stream_eval(model, ids, chunk=ids.shape[1], start=start)
    rows = [kl_divergence(full, stream_eval(model, ids, policy, chunk, start))[0] for policy in policies.values()]
    return _labelled(torch.stack(rows), list(policies), start)


@torch.no_grad()
def sparsity(filled: Prefilled, *, below: float = 0.01, top: float = 0.2) -> xr.Dataset:
    """How few keys carry the attention, by layer.

    `quiet`: share of visible keys with less than `below` times their row's maximum. `top_share`: share of all the mass that
    falls on the `top` share of keys with the largest accumulated mass. Both are means over heads (and rows), in [0, 1].
    """
    quiet, share = [], []
    for layer, q in zip(filled.cache.layers, filled.queries, strict=True):
        k, length = layer.keys.repeat_interleave(q.shape[1] // layer.keys.shape[1], 1), q.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill_(~seen, -torch.inf)
        low = (score < score.amax(-1, keepdim=True) + math.log(below)) & seen
        quiet.append(float(low.sum() / (seen.sum() * low.shape[0] * low.shape[1])))
        mass = score.softmax(-1).sum(-2)
        share.append(float(mass.topk(round(top * length)).values.sum() / mass.sum()))
    data = xr.Dataset({"quiet": ("layer", quiet), "top_share": ("layer", share)}, {"layer": range(len(quiet))})
    data.quiet.attrs["long_name"] = f"keys below {below:.0%} of their row's maximum"
    data.top_share.attrs["long_name"] = f"mass on the top {top:.0%} of keys"
    return data


def _labelled(kl: Tensor, methods: list[str], start: int) -> xr.DataArray:
    position = range(start, start + kl.shape[1])
    data = xr.DataArray(kl.numpy(), {"method": methods, "token": position}, ("method", "token"), "kl")
    data.attrs = {"long_name": "KL from the full cache", "units": "nats"}
    data.token.attrs["long_name"] = "position in the text"
    return data


def copy_recall(
    model: Any, passage: Tensor, start: int, policy: Policy | None = None, *, lead: int = 32, score: int = 64
) -> Tensor:
    """NLL (score,) in nats of a span of the passage that comes again, after its first `lead` tokens did.

    The passage (1, L) is prefilled under `policy`; the span begins at `start`.

    Raises:
        ValueError: a span that leaves the passage, or a lead or score below 1.
    """
    check.shapes("copy_recall", passage=(passage, "1 length"))
    check.at_least("copy_recall", 1, lead=lead, score=score)
    check.within("copy_recall", 0, passage.shape[1] - lead - score, start=start)
    _, cache, _ = prefill(model, passage, policy)
    span = passage[:, start : start + lead + score]
    logits = continue_with(model, cache, span[:, :-1])[:, -score:]
    return _nll(logits, span[:, -score:])[0]


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


class Lookup(NamedTuple):
    """One context and questions about it. All questions have one length, so that they make a batch."""

    context: Tensor  # (1, L)
    questions: Tensor  # (Q, n): "The code of apple is "
    digits: Tensor  # (Q, 4): the ids of the answer's digits
    line: Tensor  # (Q,): which line of the context holds the answer


def code_lookup(tokenizer: Any, *, items: int = 24, questions: int | None = None, generator: torch.Generator) -> Lookup:
    """Lines "The code of <name> is <four digits>." and questions that repeat a line up to its code.

    Args:
        tokenizer: of the model; it must write each digit as a token.
        items: lines, each with a name of its own.
        questions: how many lines are asked for, drawn without repetition; default all.
    Raises:
        ValueError: more items than names of one token, more questions than items, or a tokenizer that joins digits.
    """
    names = [name for name in NAMES if len(_ids(tokenizer, f" {name}")) == 1]
    check.within("code_lookup", 1, len(names), items=items)
    questions = items if questions is None else questions
    check.within("code_lookup", 1, items, questions=questions)
    order = torch.randperm(len(names), generator=generator)[:items].tolist()
    codes = [f"{code:04d}" for code in torch.randint(0, 10_000, (items,), generator=generator).tolist()]
    lines = [f"The code of {names[i]} is {code}" for i, code in zip(order, codes, strict=True)]
    asked = torch.randperm(items, generator=generator)[:questions]
    rows = torch.tensor([_ids(tokenizer, lines[i]) for i in asked.tolist()])
    if tokenizer.decode(rows[0, -4:]) != codes[int(asked[0])]:
        check.fail("code_lookup", f"the code becomes {rows[0, -4:].tolist()}", "a tokenizer with one token for each digit")
    context = torch.tensor([_ids(tokenizer, ".\n".join(lines) + ".\n")])
    return Lookup(context, rows[:, :-4], rows[:, -4:], asked)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def ask_codes(
    model: Any, lookup: Lookup, policy: Callable[[int], Policy] | None = None, *, question_seen: bool = True
) -> xr.Dataset:
    """Teacher-forced answers to every question: `nll` (question, digit) nats, `right` (question, digit) bool.

    Args:
        policy: given the tokens that it compresses (context and, if seen, question), the policy; None keeps everything.
        question_seen: whether the question is in the prompt when it is compressed, or comes after.
    """
    check.shapes("ask_codes", context=(lookup.context, "1 length"), questions=(lookup.questions, "questions n"))
    count, asked = lookup.context.shape[1], lookup.questions.shape[1]
    until = count + asked if question_seen else count
    cache = PolicyCache(model.config, policy(until) if policy else None, hold_until=until)
    continue_with(model, cache, lookup.context, keep=1)
    cache.batch_repeat_interleave(len(lookup.questions))
    first = continue_with(model, cache, lookup.questions, keep=1)
    logits = torch.cat((first, continue_with(model, cache, lookup.digits[:, :-1])), 1)
    values = {"nll": _nll(logits, lookup.digits), "right": logits.argmax(-1) == lookup.digits}
    data = xr.Dataset({name: (("question", "digit"), value.numpy()) for name, value in values.items()})
    data.nll.attrs = {"long_name": "answer's negative log-likelihood", "units": "nats per digit"}
    data.right.attrs = {"long_name": "digit accuracy"}
    return data.assign_coords(line=("question", lookup.line.numpy()), held=max(cache.held))
