"""Requests behind one prefix write what they would alone, and the prefix is held once."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from memlens.kv.shared_prefix import SharedPrefix
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


@torch.no_grad()
def test_several_turns_and_two_batches_share_one_copy(model, generator, assert_close):
    prefix, own = torch.randint(40, (1, 6), generator=generator), torch.randint(40, (2, 7), generator=generator)
    shared = SharedPrefix(model, prefix)
    assert shared.nbytes == 2 * 2 * 2 * 6 * 8 * 4  # layers, keys and values, kv heads, tokens, dim, bytes
    with shared.open() as opened:
        for rows in (own, own[:1]):
            cache = opened.requests()
            parts = [model(part, past_key_values=cache).logits for part in rows.split(3, 1)]
            assert cache.get_seq_length() == 13
            assert cache.layers[0].keys.shape[2] == 7
            whole = torch.cat((prefix.expand(len(rows), -1), rows), 1)
            twin = torch.cat(parts, 1)
            with torch.no_grad():
                wanted = reference(model, whole)[:, 6:]
            assert_close(twin, wanted)


def reference(model, ids):
    """The model's own attention, also while another one is installed."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        return model(ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


def test_refusals(model):
    with pytest.raises(ValueError, match="SharedPrefix: ids has shape"):
        SharedPrefix(model, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="prefix=0"):
        SharedPrefix(model, torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.model
def test_smollm2_writes_the_same_together(smollm2):
    model, tokenizer = smollm2
    prefix, own = prompts(tokenizer, 1)
    alone, together = (way(model, prefix[:, :64], own[:2], new=4) for way in (serve_alone, serve_together))
    assert torch.equal(alone.written, together.written)
    assert (alone.next_logits - together.next_logits).abs().max() <= 1e-4
