"""Tensors from process to process over gloo, with a log of what travelled.

A `Comm` is one rank's end of a group of its own: torch's default process group is neither used nor disturbed, so several
groups live side by side and a notebook may open as many as it likes. Everything stays on the loopback interface.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import xarray as xr
from torch import Tensor
from torch import distributed as dist

from memlens import check

__all__ = ["Comm", "CommEvent", "Inbox", "volume"]


class CommEvent(NamedTuple):
    op: str  # "send" | "receive"
    tag: str  # what the tensor is, e.g. "q"
    peer: int
    sent: int  # payload bytes
    received: int
    t0: float  # seconds, time.perf_counter
    t1: float


class Inbox(NamedTuple):
    """A tensor on its way: `Comm.wait` returns it."""

    tensor: Tensor
    work: object
    tag: str
    peer: int
    t0: float


class Comm:
    """Rank `rank` of `world`, meeting the others through the file `meeting`.

    Args:
        meeting: a path that every rank can reach and that no other group uses.
        timeout_s: how long to wait for the others, now and in every call that does not say otherwise.
    Raises:
        RuntimeError: the others did not come within the time.
    """

    def __init__(self, rank: int, world: int, meeting: Path | str, *, timeout_s: float = 60.0):
        check.at_least("Comm", 2, "one process needs no group", world=world)
        check.within("Comm", 0, world - 1, rank=rank)
        self.rank, self.world, self.timeout_s, self.log = rank, world, timeout_s, []
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout = [_loopback()], timedelta(seconds=timeout_s)
        self._group = dist.ProcessGroupGloo(dist.FileStore(str(meeting), world), rank, world, options)

    def send(self, x: Tensor, to: int, tag: str = "") -> None:
        """Send a contiguous copy of x to rank `to`; returns when it may be changed again."""
        start, x = time.perf_counter(), x.detach().contiguous()
        self._group.send([x], to, 0).wait(timedelta(seconds=self.timeout_s))
        self.log.append(CommEvent("send", tag, to, x.numel() * x.element_size(), 0, start, time.perf_counter()))

    def post(self, shape: Iterable[int], dtype: torch.dtype, sender: int, tag: str = "") -> Inbox:
        """Make room for a tensor that rank `sender` sends, without waiting for it."""
        held = torch.empty(tuple(shape), dtype=dtype)
        return Inbox(held, self._group.recv([held], sender, 0), tag, sender, time.perf_counter())

    def wait(self, inbox: Inbox, *, timeout_s: float | None = None) -> Tensor:
        """The tensor of an inbox, when it is there.

        Raises:
            RuntimeError: the sender died, or the time is up.
        """
        inbox.work.wait(timedelta(seconds=self.timeout_s if timeout_s is None else timeout_s))
        size, end = inbox.tensor.numel() * inbox.tensor.element_size(), time.perf_counter()
        self.log.append(CommEvent("receive", inbox.tag, inbox.peer, 0, size, inbox.t0, end))
        return inbox.tensor

    def receive(
        self, shape: Iterable[int], dtype: torch.dtype, sender: int, tag: str = "", *, timeout_s: float | None = None
    ) -> Tensor:
        """`post` and `wait` at once."""
        return self.wait(self.post(shape, dtype, sender, tag), timeout_s=timeout_s)


def _loopback():
    return dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")


def volume(log: Iterable[CommEvent], tags: Iterable[str] | None = None) -> xr.Dataset:
    """Payload bytes and messages of a log: `sent`, `received`, `messages` over (tag).

    Args:
        tags: which ones, in this order; default all that occur, sorted.
    """
    log = list(log)
    names = sorted({event.tag for event in log}) if tags is None else list(tags)
    mine = {name: [event for event in log if event.tag == name] for name in names}
    data = {
        "sent": ("tag", [sum(event.sent for event in mine[name]) for name in names]),
        "received": ("tag", [sum(event.received for event in mine[name]) for name in names]),
        "messages": ("tag", [len(mine[name]) for name in names]),
    }
    out = xr.Dataset(data, {"tag": names})
    for name in ("sent", "received"):
        out[name].attrs = {"long_name": f"bytes {name}", "units": "B"}
    return out
