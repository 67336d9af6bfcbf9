"""The optimizer's shell: the functional step inside, exact resume, honest bytes, gradients freed in backward."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memlens.optim import Projected, adam_direction, galore_step, projected_groups

STATES = pytest.mark.parametrize("states", ["float32", "bfloat16", "dyn8"])


def wide_net(generator):
    """Large enough that moments pass the 4096 elements below which they stay float32."""
    model = nn.Sequential(nn.Linear(64, 300), nn.SiLU(), nn.Linear(300, 20, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def wide_batches(generator, n):
    return [(torch.randn(16, 64, generator=generator), torch.randn(16, 20, generator=generator)) for _ in range(n)]


def test_it_takes_the_functional_steps(net, batches, run, assert_close):
    model, twin = net(), net()
    optimizer = Projected(projected_groups(model, rank=3), lr=0.02, every=2, weight_decay=0.1)
    held = {}
    for x, y in batches(5):
        run(model, optimizer, [(x, y)])
        twin.zero_grad()
        F.mse_loss(twin(x), y).backward()
        for name, p in twin.named_parameters():
            with torch.no_grad():
                if name in ("up.weight", "down.weight"):
                    new, held[name] = galore_step(p, p.grad, held.get(name), 0.02, 3, 2, 0.25, weight_decay=0.1)
                else:
                    direction, held[name] = adam_direction(p.grad, held.get(name), eps=1e-6, eps_mode="hf")
                    new = (p - 0.02 * direction) * (1 - 0.02 * 0.1)
                p.copy_(new)
    assert_close(list(model.state_dict().values()), list(twin.state_dict().values()))


def test_it_walks_with_galore_torch(net, batches, run, assert_close, galore_peer):
    ours, theirs = net(), net()
    low = {"rank": 3, "update_proj_gap": 50, "scale": 0.25, "proj_type": "std"}
    rest = [theirs.up.bias, theirs.head.weight]
    groups = [{"params": [theirs.up.weight, theirs.down.weight], **low}, {"params": rest}]
    run(theirs, galore_peer(groups, lr=0.02, no_deprecation_warning=True), batches(8))
    run(ours, Projected(projected_groups(ours, rank=3), lr=0.02, every=50), batches(8))
    assert_close(list(ours.state_dict().values()), list(theirs.state_dict().values()))


@STATES
def test_resume_between_refreshes_is_bit_exact(states, generator):
    pairs = wide_batches(generator, 7)

    def start():
        model = wide_net(torch.Generator().manual_seed(4))
        return model, Projected(projected_groups(model, rank=16), lr=0.02, every=3, states=states)

    def steps(model, optimizer, chosen):
        for x, y in chosen:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()

    straight, optimizer = start()
    steps(straight, optimizer, pairs)
    first, optimizer = start()
    steps(first, optimizer, pairs[:4])  # refreshes at 0, 3 and 6: saved one step after a refresh
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    second, optimizer = start()
    second.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    steps(second, optimizer, pairs[4:])
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_a_resume_into_bfloat16_weights_keeps_scales_and_codes(generator):
    model = wide_net(generator).bfloat16()
    optimizer = Projected(projected_groups(model, rank=16), states="dyn8")
    x, y = wide_batches(generator, 1)[0]
    F.mse_loss(model(x.bfloat16()), y.bfloat16()).backward()
    optimizer.step()
    other = Projected(projected_groups(model, rank=16), states="dyn8")
    other.load_state_dict(optimizer.state_dict())
    for p, held in optimizer.state.items():
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                assert other.state[p][name].dtype == value.dtype
                assert torch.equal(other.state[p][name], value)
            else:
                assert other.state[p][name] == value


@STATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_real_tensors_and_of_the_plan(states, dtype, generator):
    model = wide_net(generator).to(dtype)
    optimizer = Projected(projected_groups(model, rank=16), states=states)
    assert optimizer.state_bytes() == {}
    planned = int(optimizer.describe().splitlines()[-1].split()[1].replace(",", ""))
    x, y = wide_batches(generator, 1)[0]
    F.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
    optimizer.step()
    storages = {}
    for held in optimizer.state.values():
        storages |= {
            v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in held.values() if torch.is_tensor(v)
        }
    assert sum(optimizer.state_bytes().values()) == sum(storages.values()) == planned
    width = {"float32": 4, "bfloat16": 2, "dyn8": 1}[states]
    assert optimizer.state_bytes()["sub.basis"] == (64 * 16 + 20 * 16) * dtype.itemsize
    assert optimizer.state_bytes()["inner.m.codes"] == 2 * 16 * 300 * width


def test_layerwise_is_the_same_walk_with_one_gradient_alive(net, batches, run):
    usual, hooked = net(), net()
    run(usual, Projected(projected_groups(usual, rank=3), every=2), batches(5))
    optimizer = Projected(projected_groups(hooked, rank=3), every=2, layerwise=True)
    alive = []
    for p in hooked.parameters():
        p.register_hook(lambda g: alive.append(sum(q.grad is not None for q in hooked.parameters())))
    run(hooked, optimizer, batches(5))
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), hooked.parameters(), strict=True))
    assert max(alive) == 0  # when a gradient arrives, those before it are gone
    assert len(alive) == 5 * 4
    optimizer.unhook()
    F.mse_loss(hooked(torch.ones(2, 10)), torch.ones(2, 6)).backward()
    assert all(p.grad is not None for p in hooked.parameters())


def test_layerwise_follows_a_schedule_after_a_resume(net, batches, run):
    model = net()
    optimizer = Projected(projected_groups(model, rank=3), layerwise=True)
    run(model, optimizer, batches(2))
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in model.parameters()]
    run(model, optimizer, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_closure_is_run_with_gradients_and_its_loss_returned(net, batches):
    model, ((x, y),) = net(), batches(1)
    optimizer = Projected(projected_groups(model, rank=2))

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad
    assert closure() < first


def test_groups_take_linear_weights_and_leave_tied_heads(net):
    low, rest = projected_groups(net(), rank=2)
    assert [name for name, _ in low["params"]] == ["up.weight", "down.weight"]
    assert {name for name, _ in rest["params"]} == {"up.bias", "head.weight"}
    assert (low["rank"], rest["rank"]) == (2, None)
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "out": nn.Linear(4, 9, bias=False), "mid": nn.Linear(4, 4)})
    model["out"].weight = model["table"].weight
    model["mid"].bias.requires_grad_(False)
    low, rest = projected_groups(model, rank=2)
    assert [name for name, _ in low["params"]] == ["mid.weight"]
    assert [name for name, _ in rest["params"]] == ["table.weight"]


def test_the_table_says_what_happens_to_each_parameter(net):
    model = net()
    table = Projected(projected_groups(model, rank=3), states="dyn8").describe().splitlines()
    assert table[0].split() == ["parameter", "shape", "rule", "side", "rank", "states", "bytes", "Adam"]
    assert table[1].split() == ["up.weight", "24x10", "galore", "right", "3", "float32", "696", "1,920"]
    assert table[2].split()[1:5] == ["6x24", "galore", "left", "3"]
    assert any(line.split()[:3] == ["head.weight", "6x6", "adam"] for line in table)
    unnamed = Projected([{"params": [model.up.weight]}], rank=2).describe()
    assert "#0" in unnamed


def test_what_is_refused(net):
    model = net()
    with pytest.raises(ValueError, match="rule='galor'.*'galore'"):
        Projected(model.parameters(), rule="galor", rank=None)
    with pytest.raises(ValueError, match=r"shape \(24,\).*projected_groups"):
        Projected(model.parameters(), rank=2)
    with pytest.raises(ValueError, match="rank=0"):
        Projected([model.up.weight], rank=0)
    with pytest.raises(ValueError, match="states='int4'"):
        Projected([model.up.weight], rank=2, states="int4")
    with pytest.raises(ValueError, match="lr"):
        Projected([model.up.weight], rank=2, lr=-1.0)
    with pytest.raises(ValueError, match="no Linear weight"):
        projected_groups(nn.ModuleDict({"head": nn.Linear(2, 2)}), rank=1)
    optimizer = Projected([model.up.weight], rank=2)
    with pytest.raises(ValueError, match="a matrix"):
        optimizer.add_param_group({"params": [model.up.bias]})
    assert len(optimizer.param_groups) == 1
    foreign = torch.optim.Adam([model.up.weight]).state_dict()
    with pytest.raises(ValueError, match="rule=None"):
        optimizer.load_state_dict(foreign)
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        Projected(table.parameters(), rank=2).step()
    with pytest.raises(ValueError, match="sparse"):
        Projected(table.parameters(), rank=None).step()
