"""Short convolutions and the selective scan: against torch's own, a scan by hand, linear attention, and themselves split."""

import pytest
import torch
from torch.nn import functional as F

from memlens.memory.linear import linear_attention
from memlens.memory.ssm import MambaParams, gated_short_conv, mamba_mixer, selective_scan, short_conv


def draw(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_short_conv_is_torchs_depthwise_convolution(taps, generator, assert_close):
    x, weight, bias = draw(2, 11, 5, generator=generator), draw(5, taps, generator=generator), draw(5, generator=generator)
    want = F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight[:, None], bias, groups=5).mT
    assert_close(short_conv(x, weight, bias)[0], want)
    assert_close(short_conv(x, weight, bias, activation="silu")[0], F.silu(want))


@pytest.mark.parametrize("at", [1, 2, 5])
def test_short_conv_split_inside_its_window(at, generator, assert_close):
    x, weight = draw(2, 7, 5, generator=generator), draw(5, 4, generator=generator)
    want, last = short_conv(x, weight)
    first, state = short_conv(x[:, :at], weight)
    second, state = short_conv(x[:, at:], weight, state=state)
    assert_close((torch.cat((first, second), 1), state), (want, last))


def test_segments_do_not_mix_and_may_be_split(generator, assert_close):
    x, weight = draw(1, 9, 5, generator=generator), draw(5, 4, generator=generator)
    segment = torch.tensor([[3, 3, 3, 3, 8, 8, 8, 8, 8]])
    got, state = short_conv(x, weight, segment=segment)
    apart = [short_conv(part, weight) for part in (x[:, :4], x[:, 4:])]
    assert_close((got, state), (torch.cat([out for out, _ in apart], 1), apart[1][1]))
    first, state = short_conv(x[:, :6], weight, segment=segment[:, :6])
    second, _ = short_conv(x[:, 6:], weight, segment=segment[:, 6:], state=state)
    assert_close(torch.cat((first, second), 1), got)


def test_gated_short_conv_is_its_formula(generator, assert_close):
    x, w_in, conv, w_out = (draw(*s, generator=generator) for s in ((2, 6, 4), (24, 4), (8, 3), (4, 8)))
    b, c, u = (x @ w_in.mT).split(8, -1)
    assert_close(gated_short_conv(x, w_in, conv, w_out)[0], (c * short_conv(b * u, conv)[0]) @ w_out.mT)
    with pytest.raises(ValueError, match="3 rows for each channel"):
        gated_short_conv(x, w_in[:16], conv, w_out)


def scan_inputs(length, generator, groups=2):
    leaves = {
        "x": draw(2, length, 6, generator=generator), "dt": draw(2, length, 6, generator=generator),
        "A": -draw(6, 4, generator=generator).abs() - 0.1, "Bm": draw(2, length, groups, 4, generator=generator),
        "Cm": draw(2, length, groups, 4, generator=generator), "D": draw(6, generator=generator),
        "z": draw(2, length, 6, generator=generator), "dt_bias": draw(6, generator=generator),
        "state": draw(2, 6, 4, generator=generator),
    }  # fmt: skip
    return {name: x.requires_grad_() for name, x in leaves.items()}


@pytest.mark.parametrize("length", [1, 16, 37])
def test_the_scan_gives_the_reference_forward_and_backward(length, generator, assert_close):
    leaves = scan_inputs(length, generator)
    both = []
    for form in ("reference", "torch"):
        y, h = selective_scan(**leaves, form=form)
        seeded = torch.Generator().manual_seed(1)
        total = (y * draw(*y.shape, generator=seeded)).sum() + (h * draw(*h.shape, generator=seeded)).sum()
        both.append([y, h, *torch.autograd.grad(total, list(leaves.values()))])
    assert_close(both[1], both[0])


def test_the_scan_by_hand_on_one_channel(assert_close):
    """Zero-order hold on A only: h = e^(dt A) h + dt B x with dt = ln 2, A = -1 halves the state at each token."""
    step = torch.full((1, 3, 1), 2.0).log()
    x, ones = torch.tensor([1.0, 0.0, 4.0]).reshape(1, 3, 1), torch.ones(1, 3, 1, 1)
    y, h = selective_scan(x, step, -torch.ones(1, 1), ones, ones, softplus=False)
    assert_close(y.flatten() / step[0, 0], torch.tensor([1.0, 0.5, 4.25]))
    assert_close(h.flatten(), y[0, -1])


def test_one_decay_for_all_states_is_linear_attention(generator, assert_close):
    x, dt = draw(2, 30, 6, generator=generator), draw(2, 30, 6, generator=generator).abs()
    A = -torch.rand(6, 1, generator=generator, dtype=torch.float64)
    B, C = draw(2, 30, 1, 4, generator=generator), draw(2, 30, 1, 4, generator=generator)
    got, h = selective_scan(x, dt, A.expand(6, 4), B, C, softplus=False)
    v, g = (dt * x).transpose(1, 2)[..., None], (dt * A[:, 0]).transpose(1, 2)
    want, state = linear_attention(C.transpose(1, 2), B.transpose(1, 2), v, log_decay=g, chunk=8)
    assert_close((got, h), (want[..., 0].mT, state.S[..., 0]))


@pytest.mark.parametrize("at", [2, 16, 21])
def test_the_mixer_split_anywhere_and_its_memory(at, generator, assert_close):
    shapes = {"in_proj": (12, 4), "conv": (6, 4), "conv_bias": (6,), "x_proj": (2 + 6, 6), "dt_proj": (6, 2), "dt_bias": (6,),
              "A_log": (6, 3), "D": (6,), "out_proj": (4, 6)}  # fmt: skip
    p = MambaParams(**{name: draw(*shape, generator=generator) for name, shape in shapes.items()})
    x = draw(2, 25, 4, generator=generator)
    y, last, memory = mamba_mixer(x, p, return_memory=True)
    first, state = mamba_mixer(x[:, :at], p)
    second, state = mamba_mixer(x[:, at:], p, state=state)
    assert_close((torch.cat((first, second), 1), *state), (y, *last))
    z = (x @ p.in_proj.mT).chunk(2, -1)[1]
    assert_close(y, (memory * F.silu(z)) @ p.out_proj.mT)


def test_the_scan_refuses(generator):
    leaves = {name: x.detach() for name, x in scan_inputs(5, generator).items()}
    for change, message in (
        ({"A": -leaves["A"]}, "A < 0"),
        ({"softplus": False, "dt": -leaves["dt"].abs() - 9}, "dt"),
        ({"Bm": leaves["Bm"][:, :, :1]}, "groups"),
        ({"state": leaves["state"][:1]}, "state has shape"),
        ({"form": "triton"}, "selective_scan has no kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_scan(**{**leaves, **change})
    with pytest.raises(ValueError, match="state has shape"):
        short_conv(leaves["x"], torch.ones(6, 4), state=torch.zeros(2, 6, 4))
