"""Requests behind one prefix write what they would alone, from fewer tokens."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from memlens.tasks.prefix_studies import prompts, serve_alone, serve_together

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 40,
}  # fmt: skip
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "mistral": (MistralForCausalLM, lambda **sizes: MistralConfig(**sizes, sliding_window=None)),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    build, config = KINDS[request.param]
    return build(config(**SIZES)).eval()


@torch.no_grad()
def test_together_is_alone(model, generator, assert_close):
    prefix, own = torch.randint(40, (1, 11), generator=generator), torch.randint(40, (3, 5), generator=generator)
    alone, together = serve_alone(model, prefix, own, new=4), serve_together(model, prefix, own, new=4)
    assert torch.equal(alone.written, together.written)
    assert_close(together.next_logits, alone.next_logits)
    assert (alone.prefill_tokens, together.prefill_tokens) == (3 * 16, 11 + 15)


@pytest.mark.model
def test_smollm2_writes_the_same_together(smollm2):
    model, tokenizer = smollm2
    prefix, own = prompts(tokenizer, 1)
    alone, together = (way(model, prefix[:, :64], own[:2], new=4) for way in (serve_alone, serve_together))
    assert torch.equal(alone.written, together.written)
    assert (alone.next_logits - together.next_logits).abs().max() <= 1e-4
