"""Devices, links and hosts that the cost models know: one table, each number with its unit and where it comes from.

    flops      dense half-precision operations a second (datasheet, without sparsity)
    bandwidth  bytes a second to the device's own memory (datasheet)
    memory     bytes
    price      dollars an hour of one device, assumed: about what clouds asked on demand in 2024; 0 where none is needed

Source: NVIDIA datasheets for H100 SXM, H20, A100 80GB SXM, T4 and A10. Prices, `host-*` and links are assumptions of ours: what
a rented machine of that kind sustains, not what its parts could.
"""

from __future__ import annotations

from typing import NamedTuple

from memlens import check

__all__ = ["DEVICES", "LINKS", "Device", "device", "link"]


class Device(NamedTuple):
    name: str
    flops: float  # operations/s
    bandwidth: float  # B/s
    memory: float  # B
    price: float = 0.0  # $/h

    @property
    def ridge(self) -> float:
        """Operations for each byte at which computing and reading take equally long."""
        return self.flops / self.bandwidth

    def times(self, count: int) -> Device:
        """`count` of them as one device: everything adds up (perfect tensor parallelism)."""
        check.at_least("Device.times", 1, count=count)
        return Device(f"{count} x {self.name}", *(count * value for value in self[1:]))


_TABLE = (
    Device("h100", 989e12, 3.35e12, 80e9, 11.06),
    Device("h20", 148e12, 4.0e12, 96e9, 4.63),
    Device("a100", 312e12, 2.04e12, 80e9, 3.67),
    Device("t4", 65e12, 320e9, 16e9, 0.53),
    Device("a10", 125e12, 600e9, 24e9, 1.01),
    # assumed: a share of a two-socket Xeon with DDR4-2933; attention reads at about a tenth of the T4's rate
    Device("host-t4", 1.0e12, 32e9, 192e9),
    # assumed: a share of an EPYC Rome with DDR4-3200
    Device("host-a10", 1.5e12, 45e9, 256e9),
)
DEVICES: dict[str, Device] = {each.name: each for each in _TABLE}

# B/s one way; assumed to reach 80 % of what the bus or the card is sold for
LINKS: dict[str, float] = {"pcie3": 0.8 * 16e9, "pcie4": 0.8 * 32e9, "ethernet-400": 0.8 * 50e9}


def device(name: str) -> Device:
    """The device called `name`.

    Raises:
        ValueError: an unknown name, with the nearest.
    """
    check.one_of("device", DEVICES, name=name)
    return DEVICES[name]


def link(name: str) -> float:
    """Bytes a second, one way, of the link called `name`.

    Raises:
        ValueError: an unknown name, with the nearest.
    """
    check.one_of("link", LINKS, name=name)
    return LINKS[name]
