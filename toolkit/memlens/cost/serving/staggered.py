"""Batches that take turns on model replicas and one attention pool: rotational staggered pipelining.

n batches share n - 1 replicas of the model and one pool that attends. Batch j starts j·t_m/(n - 1) later than batch 0; its slice k
(everything between two attentions) runs on replica (j + k) mod (n - 1). When t_a = t_m/(n - 1), a slice ends exactly when its
attention can begin, and no device ever waits. Source: arXiv:2405.01814, section 4.3.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from memlens import check

__all__ = ["replica", "staggered_schedule"]


def replica(batch: int, slice_: int, batches: int) -> int:
    """Which of the batches - 1 replicas runs a batch's slice. With two batches it is always the same: nothing migrates."""
    check.at_least("replica", 2, batches=batches)
    return (batch + slice_) % (batches - 1)


def staggered_schedule(n: int, tm: float, ta: float, *, slices: int = 8) -> xr.Dataset:
    """When each slice and each attention of n batches runs, on n - 1 replicas and one attention pool.

    Every device serves its work in the order in which it comes due. With ta = tm/(n - 1) nothing waits.

    Args:
        n: batches, at least 2.
        tm, ta: seconds of a model slice and of an attention, positive.
        slices: for each batch; an attention follows each.
    Returns:
        `start` and `end` (batch, slice, part), s, with part "model" or "attention"; `device` (batch, slice, part), a replica's
        number or n - 1 for the attention pool; `idle` (device), s that a device waits between its first and last work.
    Raises:
        ValueError: fewer than 2 batches, no slices, or times that are not positive.
    """
    check.at_least("staggered_schedule", 2, "one batch has nothing to overlap with", n=n)
    check.at_least("staggered_schedule", 1, slices=slices)
    if not (tm > 0 and ta > 0):
        check.fail("staggered_schedule", f"tm={tm}, ta={ta}", "positive times")
    start, place = np.zeros((n, slices, 2)), np.zeros((n, slices, 2), dtype=int)
    due, free = [j * tm / (n - 1) for j in range(n)], [0.0] * n
    order = {(due[j], 0, j): (j, 0, 0) for j in range(n)}
    while order:
        key = min(order)
        (at, _, j), (_, k, part) = key, order.pop(key)
        device = n - 1 if part else replica(j, k, n)
        begin = max(at, free[device])
        start[j, k, part], place[j, k, part] = begin, device
        free[device] = end = begin + (ta if part else tm)
        following = (k, 1) if part == 0 else (k + 1, 0)
        if following[0] < slices:
            order[end, 1 - following[1], j] = (j, *following)
    return _labelled(start, place, np.array([tm, ta]))


def _labelled(start: np.ndarray, place: np.ndarray, times: np.ndarray) -> xr.Dataset:
    n, slices, _ = start.shape
    dims = ("batch", "slice", "part")
    data = xr.Dataset(
        {"start": (dims, start), "end": (dims, start + times), "device": (dims, place)},
        {"batch": range(n), "slice": range(slices), "part": ["model", "attention"]},
    )
    span = [(data.end.where(data.device == d).max() - data.start.where(data.device == d).min()).item() for d in range(n)]
    busy = [((data.end - data.start).where(data.device == d)).sum().item() for d in range(n)]
    data["idle"] = ("device_id", np.array(span) - np.array(busy))
    for name, words in (("start", "starts"), ("end", "ends"), ("idle", "waits")):
        data[name].attrs = {"long_name": words, "units": "s"}
    return data
