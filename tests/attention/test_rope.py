"""Rotary positions: products depend on the distance, rotations add up, and the layout is Llama's."""

import pytest
import torch

from memlens.attention.rope import frequencies, rope, shift, unrope

LAYOUT = pytest.mark.parametrize("layout", ["half", "interleaved"])


@LAYOUT
def test_products_depend_on_the_distance_only(layout, generator, assert_close):
    q, k = torch.randn(2, 1, 16, generator=generator, dtype=torch.float64)
    freq = frequencies(16)
    products = [
        rope(q, torch.tensor([p]), freq, layout=layout) @ rope(k, torch.tensor([p - 5]), freq, layout=layout).mT
        for p in (5, 70)
    ]
    assert_close(products[0], products[1], atol=1e-6)


@LAYOUT
def test_shift_adds_and_unrope_undoes(layout, generator, assert_close):
    k, pos, freq = torch.randn(2, 3, 9, 16, generator=generator), torch.arange(9), frequencies(16, theta=1e5)
    turned = rope(k, pos, freq, layout=layout)
    assert_close(shift(turned, 100, freq, layout=layout), rope(k, pos + 100, freq, layout=layout), atol=1e-4)
    assert_close(unrope(turned, pos, freq, layout=layout), k)
    assert_close(turned.norm(dim=-1), k.norm(dim=-1))


def test_the_half_layout_is_that_of_llama(generator, assert_close):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, pos, freq = torch.randn(1, 2, 7, 8, generator=generator), torch.arange(7), frequencies(8)
    angle = torch.cat([pos[:, None] * freq] * 2, -1)[None]
    want, _ = llama.apply_rotary_pos_emb(x, x, angle.cos(), angle.sin())
    assert_close(rope(x, pos, freq), want)


def test_refusals():
    with pytest.raises(ValueError, match=r"dim=7; expected an even dim"):
        frequencies(7)
    with pytest.raises(ValueError, match=r"inv_freq of dim / 2"):
        rope(torch.zeros(3, 8), torch.arange(3), frequencies(16))
    with pytest.raises(ValueError, match=r"did you mean 'half'"):
        rope(torch.zeros(3, 8), torch.arange(3), frequencies(8), layout="halves")
