"""Masks by hand, and a mixed mask as the model uses it."""

import pytest
import torch

from memlens.attention.exact import attend
from memlens.attention.masks import mix_heads, stream_mask


def picture(mask):
    return ["".join(".x"[int(x)] for x in row) for row in mask]


def test_sink_and_window_by_hand():
    assert picture(stream_mask(6, 6, sink=1, recent=2)) == ["x.....", "xx....", "xxx...", "x.xx..", "x..xx.", "x...xx"]


def test_decode_rows_line_up_with_the_end():
    whole = stream_mask(9, 9, sink=2, recent=3)
    assert torch.equal(stream_mask(4, 9, sink=2, recent=3), whole[-4:])
    assert torch.equal(stream_mask(4, 9, sink=2, recent=3, q_offset=2), whole[2:6])


def test_sink_and_window_over_everything_is_causal(qkv, assert_close):
    q, k, v = qkv(1, 2, 2, 12, 12, 8)
    assert_close(attend(q, k, v, causal=False, mask=stream_mask(12, 12, sink=4, recent=8)), attend(q, k, v))


def test_heads_of_two_kinds(qkv, assert_close):
    full, other = torch.ones(10, 10, dtype=torch.bool).tril(), stream_mask(10, 10, sink=1, recent=3)
    is_full = torch.tensor([True, False])  # of two kv heads, for four query heads
    mask = mix_heads(full, other, is_full, heads=4)
    assert mask.shape == (4, 10, 10)
    q, k, v = qkv(1, 4, 2, 10, 10, 8)
    got = attend(q, k, v, mask=mask)
    assert_close(got[:, :2], attend(q, k, v)[:, :2])
    assert_close(got[:, 2:], attend(q, k, v, mask=other)[:, 2:])


def test_refusals():
    with pytest.raises(ValueError, match=r"sink=0 and recent=0"):
        stream_mask(4, 4, sink=0, recent=0)
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"heads=3 is no multiple of entries=2"):
        mix_heads(mask, mask, torch.tensor([True, False]))
    with pytest.raises(TypeError, match=r"is_full is torch.float32"):
        mix_heads(mask, mask, torch.ones(3))
    with pytest.raises(ValueError, match=r"with one H"):
        mix_heads(mask, mask[:2], torch.tensor([True]))
