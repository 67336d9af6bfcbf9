"""The cache's contract is stated once, in `kv_presets.py`, for every policy and every model."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import kv_presets as presets


@pytest.fixture(params=presets.MODELS)
def model(request):
    return presets.tiny(request.param)


@pytest.fixture
def llama():
    return presets.tiny("llama")


@pytest.fixture
def dense():
    return dense_under_keep_mask


def dense_under_keep_mask(model, cache, parts):
    """(logits of an evicting run over `parts`, logits of one dense forward whose attention is masked to what was held).

    A cache that has seen parts[0] already gives no logits for it.
    """
    from memlens.attention.exact import attend
    from memlens.models.hooks import use_attention

    length = sum(part.shape[1] for part in parts)
    heads, layers = model.config.num_key_value_heads, len(cache.layers)
    keep = torch.zeros(layers, parts[0].shape[0], heads, length, length, dtype=torch.bool)
    got, start = [], 0
    with torch.no_grad():
        for part in parts:
            stop = start + part.shape[1]
            for layer in range(layers):
                if start:
                    held = cache.positions(layer)  # (B, Hkv, held), or one (B, held) for each head of a split
                    for head, pos in enumerate(held if isinstance(held, list) else held.unbind(1)):
                        keep[layer, :, head, start:stop].scatter_(
                            -1, pos.long()[:, None].expand(-1, stop - start, -1), True
                        )
                keep[layer, :, :, start:stop, start:stop] = True
            if stop > cache.get_seq_length():
                with cache.on(model):
                    got.append(model(part, past_key_values=cache).logits)
            start = stop

        def masked(layer, q, k, v, offset):
            return attend(q, k, v, mask=keep[layer].repeat_interleave(q.shape[1] // k.shape[1], 1))

        with use_attention(model, masked):
            want = model(torch.cat(parts, 1), use_cache=False).logits
    return torch.cat(got, 1), want
