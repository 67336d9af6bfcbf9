"""Bytes of optimizer state: a case by hand, the parameter count of LLaMA-7B, and a real optimizer's tensors."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memlens.cost.memory import LLAMA_7B, Llama, Weight, llama_weights, optimizer_bytes, training_bytes
from memlens.optim import Projected, projected_groups

TINY = Llama(8, 20, 2, 32, 4, 2)


def total(parts):
    return sum(parts.values())


def test_one_matrix_by_hand():
    matrix = [Weight("w", (10, 4), 3, True)]
    assert optimizer_bytes(matrix, "adam", moment_bytes=2) == {"projector": 0, "low_rank": 0, "full": 3 * 2 * 40 * 2}
    galore = optimizer_bytes(matrix, "galore", rank=2, moment_bytes=1, projector_bytes=2)
    assert galore == {"projector": 3 * 4 * 2 * 2, "low_rank": 3 * 2 * 10 * 2, "full": 0}
    assert total(optimizer_bytes(matrix, "lora", rank=2)) == 3 * 2 * 14 * 2 * 4
    assert total(optimizer_bytes(matrix, "sgd")) == 3 * 40 * 4
    assert optimizer_bytes(matrix, "galore", rank=99)["projector"] == 3 * 4 * 4 * 4  # the rank is capped


def test_llama_7b_has_its_published_parameter_count():
    assert sum(weight.numel for weight in llama_weights(LLAMA_7B)) == 6_738_415_616


def test_any_config_with_the_fields_serves_and_tying_drops_the_head():
    config = SimpleNamespace(**TINY._asdict())
    assert llama_weights(config) == llama_weights(TINY)
    tied = sum(w.numel for w in llama_weights(TINY._replace(tie_word_embeddings=True)))
    assert sum(w.numel for w in llama_weights(TINY)) - tied == 32 * 8


def test_the_formula_counts_what_a_real_optimizer_holds():
    """A module with exactly the shapes of the tiny config, stepped once."""
    model = nn.ModuleDict()
    for weight in llama_weights(TINY):
        for i in range(weight.count):
            if weight.low_rank:
                model[f"{weight.name}{i}"] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            elif len(weight.shape) == 2:
                model[f"{weight.name}{i}"] = nn.Embedding(*weight.shape)
            else:
                model[f"{weight.name}{i}"] = nn.RMSNorm(weight.shape[0])
    optimizer = Projected(projected_groups(model, rank=3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    want = optimizer_bytes(TINY, "galore", rank=3)
    held = optimizer.state_bytes()
    assert held["sub.basis"] == want["projector"]
    assert held["inner.m.codes"] + held["inner.v.codes"] == want["low_rank"]
    assert held["m.codes"] + held["v.codes"] == want["full"]


def test_training_bytes_add_up_and_layerwise_keeps_the_largest_gradient():
    plain = training_bytes(TINY, "adam")
    count = sum(weight.numel for weight in llama_weights(TINY))
    assert plain["weights"] == plain["gradients"] == 2 * count
    assert training_bytes(TINY, "adam", layerwise=True)["gradients"] == 2 * 32 * 8
    assert total(training_bytes(TINY, "adam", activations=7)) == total(plain) + 7


def test_what_is_refused():
    with pytest.raises(ValueError, match="method='galor'"):
        optimizer_bytes(TINY, "galor", rank=2)
    with pytest.raises(ValueError, match="a rank for"):
        optimizer_bytes(TINY, "galore")
    with pytest.raises(ValueError, match="only for them"):
        optimizer_bytes(TINY, "adam", rank=2)
    with pytest.raises(ValueError, match="rank=0"):
        optimizer_bytes(TINY, "lora", rank=0)
    with pytest.raises(ValueError, match="hidden_size=9"):
        llama_weights(TINY._replace(hidden_size=9))
