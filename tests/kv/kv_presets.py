"""One table of presets and one of models: a new policy gets every contract test by adding a row."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from memlens.kv.policies import full, h2o, keyformer, random_keep, scissorhands, sirllm, snapkv, streaming, tova


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


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
}
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


__all__ = ["DRAWN", "MODELS", "ONCE", "PRESETS", "ROLLING", "full", "generator", "prompt", "tiny"]
