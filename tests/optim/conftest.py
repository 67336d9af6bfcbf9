"""What the optimizer tests share: a two-layer net, seeded gradients, and the peer GaLore where it is installed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """A tall and a wide matrix, a vector and a square head."""

    def __init__(self, generator):
        super().__init__()
        self.up, self.down = nn.Linear(10, 24), nn.Linear(24, 6, bias=False)
        self.head = nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x):
        return self.head(self.down(F.silu(self.up(x))))


@pytest.fixture
def net():
    """`net()` makes the same net each time."""
    return lambda: Net(torch.Generator().manual_seed(1))


@pytest.fixture
def batches():
    """`batches(n)` makes the same (x, y) pairs each time."""

    def make(n):
        generator = torch.Generator().manual_seed(2)
        return [(torch.randn(32, 10, generator=generator), torch.randn(32, 6, generator=generator)) for _ in range(n)]

    return make


@pytest.fixture
def run():
    """`run(model, optimizer, batches)` trains on squared error."""

    def steps(model, optimizer, pairs):
        for x, y in pairs:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()

    return steps


@pytest.fixture(scope="session")
def galore_peer():
    """galore_torch's AdamW, or a skip."""
    from memlens.bench.optim import galore_torch_adamw

    return galore_torch_adamw() or pytest.skip("galore-torch is not installed")
