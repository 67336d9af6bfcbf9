"""One table of presets and one of models: a new policy gets every contract test by adding a row."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from memlens.attention.rope import frequencies
from memlens.kv.elastic import Shield, elastic
from memlens.kv.locret import Head, RetainingHeads, retained
from memlens.kv.policies import (
    d2o,
    full,
    h2o,
    keyformer,
    locret,
    prefixkv,
    random_keep,
    scissorhands,
    sirllm,
    snapkv,
    streaming,
    tova,
)


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def exactly(policy, budget):
    """A policy that holds a share of what it has seen, with a number of tokens instead."""
    return policy._replace(share=None, budget=budget)


def retaining(dim, layers=3):
    """Heads with random weights for the models below: 4 heads over 2 kv heads of `dim`."""
    draw = generator(3)
    made = {i: Head(torch.randn(6, 8 * dim, generator=draw), torch.randn(2, 6, generator=draw)) for i in range(layers)}
    return RetainingHeads(made, frequencies(dim))


def fitting(state, block):
    """The score of `locret`, with heads that fit the model which runs."""
    return retained(state, block, heads=retaining(block.k.shape[-1]))


# budget in tokens -> policy; each holds exactly that many after eviction
PRESETS = {
    "h2o": lambda budget: h2o(budget // 2, budget - budget // 2),
    "h2o_heavy": lambda budget: h2o(budget, 0),
    "h2o_max": lambda budget: h2o(budget - 2, 2, group="max")._replace(first=1),
    "h2o_rolling": lambda budget: h2o(budget // 2, budget - budget // 2, rolling=True),
    "snapkv": lambda budget: snapkv(budget, window=3, kernel=3),
    "snapkv_avg": lambda budget: snapkv(budget, window=5, kernel=3, pool="avg"),
    "streaming": lambda budget: streaming(budget, sinks=2),
    "random": lambda budget: random_keep(budget, generator=generator(), sinks=2),
    "tova": tova,
    "scissorhands": lambda budget: scissorhands(budget, window=6, recent=2, drop=0.0),
    "keyformer": lambda budget: keyformer(budget, generator=generator())._replace(first=2),
    "sirllm": lambda budget: sirllm(start=2, entropy=budget - 4, recent=2, decay=0.9),
    "locret": lambda budget: locret(retaining(8), budget, stabilizers=2)._replace(score=fitting),
    "prefixkv": lambda budget: exactly(prefixkv([0.5] * 3, distance=-3), budget),
    "d2o": lambda budget: exactly(d2o(0.5, first=2), budget),
    "d2o_pre": lambda budget: exactly(d2o(0.5, 0.5, keys="pre_rope"), budget),
    "d2o_values": lambda budget: exactly(d2o(0.5, keys="none", beta=0.4), budget),
    "elastic": lambda budget: exactly(elastic(0.5, distance=-2), budget),
    "elastic_counts": lambda budget: exactly(elastic(0.5, 2, -1, "post_rope", counts=True), budget),
    "elastic_guarded": lambda budget: exactly(elastic(0.5, distance=-2, reach=2, shield=Shield(1, 1, 2)), budget),
}
MERGING = {name for name in PRESETS if name.startswith(("d2o", "elastic"))}
ONCE = {"snapkv", "snapkv_avg"}  # compress the prompt, then grow
ROLLING = {"h2o_rolling", "sirllm"}
DRAWN = {"random", "keyformer"}  # noise comes block by block and row by row

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 48,
    "vocab_size": 61, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
}


def tiny(name="llama"):
    """A model with random weights whose attention is far from uniform."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "q_proj" in weight_name or "k_proj" in weight_name:
                weight.mul_(12.0)
    return model


def prompt(length, rows=1, seed=2):
    return torch.randint(3, 61, (rows, length), generator=generator(seed))


__all__ = ["DRAWN", "MERGING", "MODELS", "ONCE", "PRESETS", "ROLLING", "full", "generator", "prompt", "retaining", "tiny"]
