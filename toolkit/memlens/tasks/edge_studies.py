"""The experiments behind the notebook on reasoning at the edge and `datasets/edge_adapters`.

Two house formats stand in for a reasoning style: the base model does not know them, an adapter learns them in thirty steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.kv.cache import PolicyCache, continue_with, prefill
from memlens.optim.loss import grpo_advantage, soft_barrier
from memlens.optim.peft import Adapter, lora, lora_init, response_mask
from memlens.tasks.house_formats import house_requests

__all__ = [
    "ARMS",
    "Batch",
    "Score",
    "answer_nll",
    "batches",
    "length_policy",
    "prompt_difference",
    "score",
    "start",
    "switch",
    "train_steps",
]

ARMS = ("masked", "ordinary")
FORMATS = ("logins", "orders")
RANK, ALPHA, STEPS, ROWS, LR = 8, 16.0, 30, 6, 2e-3


class Batch(NamedTuple):
    ids: Tensor  # (B, L) padded on the right
    prompt: Tensor  # (B,) tokens of the prompt
    length: Tensor  # (B,) tokens in all


def batches(tokenizer: Any, count: int, *, seed: int, rows: int = ROWS) -> list[Batch]:
    """`count` batches of requests and answers, both formats alike; other seeds give other requests (some may recur)."""
    generator, made = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        asked = [house_requests(FORMATS[row % 2], 1, generator=generator)[0] for row in range(rows)]
        heads = [tokenizer(f"Request: {r.text}\nAnswer:", add_special_tokens=False).input_ids for r in asked]
        tails = [tokenizer(f" {r.answer}\n", add_special_tokens=False).input_ids for r in asked]
        length = torch.tensor([len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)])
        ids = torch.zeros(rows, int(length.max()), dtype=torch.int64)
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            ids[row, : length[row]] = torch.tensor(head + tail)
        made.append(Batch(ids, torch.tensor([len(head) for head in heads]), length))
    return made


def start(model: Any, seed: int = 0) -> Adapter:
    """The untrained adapter of every arm: rank 8 on all linear layers."""
    return lora_init(model, rank=RANK, alpha=ALPHA, generator=torch.Generator().manual_seed(seed))


def train_steps(model: Any, adapter: Adapter, data: Sequence[Batch], *, masked: bool) -> list[float]:
    """Adam on the answers' NLL, one step for each batch; the adapter's tensors change, the losses (nats) come back.

    Args:
        masked: whether the adapter is off for the prompt, all but its last token.
    """
    optimizer, losses = torch.optim.Adam(adapter.parameters, lr=LR), []
    model.requires_grad_(False)
    for batch in data:
        mask = response_mask(batch.prompt, batch.ids.shape[1]) if masked else None
        with lora(model, adapter, mask=mask):
            logits = model(batch.ids, use_cache=False).logits
        loss = answer_nll(logits[:, :-1], batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def answer_nll(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean NLL of the answers' tokens and the share that is the likeliest one; logits (B, L - 1, V)."""
    place = torch.arange(1, batch.ids.shape[1])
    asked = (place >= batch.prompt[:, None]) & (place < batch.length[:, None])
    target = batch.ids[:, 1:]
    nll = -logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return nll[asked].mean(), (logits.argmax(-1) == target)[asked].float().mean()


class Score(NamedTuple):
    nll: float  # nats per token of the answers
    accuracy: float  # share of their tokens that are the likeliest


@torch.no_grad()
def score(model: Any, adapter: Adapter | None, data: Sequence[Batch], *, prompt: str) -> Score:
    """How well answers follow when the prompt was encoded by the "base" model or by the "adapter"."""
    check.one_of("score", ("base", "adapter"), prompt=prompt)
    rows = []
    for batch in data:
        if adapter is None:
            logits = model(batch.ids, use_cache=False).logits
        else:
            mask = response_mask(batch.prompt, batch.ids.shape[1]) if prompt == "base" else None
            with lora(model, adapter, mask=mask):
                logits = model(batch.ids, use_cache=False).logits
        rows.append(torch.stack(answer_nll(logits[:, :-1], batch)))
    return Score(*torch.stack(rows).mean(0).tolist())


@torch.no_grad()
def prompt_difference(model: Any, adapter: Adapter, ids: Tensor) -> float:
    """Largest difference between the prompt's keys and values with the masked adapter and without it.

    `ids` (1, L) is the prompt; the keys of its last token, which the adapter reads, are not compared.
    """
    base = prefill(model, ids).cache
    with lora(model, adapter, mask=response_mask(torch.tensor([ids.shape[1]]), ids.shape[1])):
        adapted = prefill(model, ids).cache
    pairs = ((a.keys, b.keys, a.values, b.values) for a, b in zip(base.layers, adapted.layers, strict=True))
    return max(
        float((x[:, :, :-1] - y[:, :, :-1]).abs().max()) for ka, kb, va, vb in pairs for x, y in ((ka, kb), (va, vb))
    )


@torch.no_grad()
def switch(model: Any, adapter: Adapter, cache: PolicyCache, last: Tensor) -> Tensor:
    """Logits (1, V) of the adapter after a prompt of which the base model holds all but the last token, `last` (1, 1)."""
    with lora(model, adapter):
        return continue_with(model, cache.fork(), last)[:, -1]


def tokens_read(model: Any, call: Callable[[], Any]) -> int:
    """Tokens that the model embeds while `call` runs."""
    counted: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: counted.append(args[0].numel()))
    try:
        call()
    finally:
        hook.remove()
    return sum(counted)


def length_policy(
    budget: float, *, steps: int = 300, groups: int = 8, samples: int = 8, margin: float = 0.2, lr: float = 0.3,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A toy: a policy over the lengths 250, 500, ... 8000 tokens is trained by the barrier's reward; longer is right more often.

    Returns:
        lengths (32,), the probability of each at first, and after training.
    """
    lengths = torch.arange(1, 33) * 250.0
    right = 1 - torch.exp(-lengths / 800)  # chance that an answer of this length is right
    first = -((lengths - 5000) / 1500).square() / 2  # log-probabilities: long answers at first
    theta = first.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=lr)
    for _ in range(steps):
        drawn = torch.multinomial(theta.detach().softmax(-1), groups * samples, replacement=True, generator=generator)
        hit = (torch.rand(len(drawn), generator=generator) < right[drawn]).float()
        reward = (hit * soft_barrier(lengths[drawn], budget, margin)).view(groups, samples)
        loss = -(grpo_advantage(reward).flatten() * theta.log_softmax(-1)[drawn]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lengths, first.softmax(-1), theta.detach().softmax(-1)
