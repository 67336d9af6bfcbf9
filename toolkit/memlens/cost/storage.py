"""Where a cache lies and what a decoding step pays for it: pages of flash, bytes over a bus, seconds by a roofline.

All of it is arithmetic on sizes and rates; nothing is measured. Rates are bytes per second, sizes bytes, times seconds.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memlens import check

__all__ = ["A6000_HOST", "OPT_13B", "Decoder", "Machine", "Step", "flash_pages", "offload_step", "shadow_bytes"]

PLACES = ("gpu", "host", "ssd", "csd")


def flash_pages(idx: Tensor, tokens_per_page: int = 16) -> Tensor:
    """How many pages hold the tokens idx (..., k), when a page holds so many consecutive tokens: (...,) int64.

    It lies between ceil(k / tokens_per_page) and min(k, pages there are). A page of 4 KB holds 16 tokens of one head of 128
    numbers in 2 bytes.

    Raises:
        ValueError: no tokens on a page, a negative or a repeated token.
    Source: arXiv:2409.04992, section IV.
    """
    check.at_least("flash_pages", 1, tokens_per_page=tokens_per_page)
    ordered = idx.sort(-1).values
    if idx.numel() and int(ordered[..., 0].min()) < 0:
        check.fail("flash_pages", f"token {int(ordered.min())}", "indices of at least 0")
    if bool((ordered.diff(dim=-1) == 0).any()):
        check.fail("flash_pages", "a repeated token", "each token once")
    return (ordered // tokens_per_page).diff(dim=-1).ne(0).sum(-1) + (1 if idx.shape[-1] else 0)


class Decoder(NamedTuple):
    """Sizes of a decoder that matter here."""

    layers: int
    heads: int
    kv_heads: int
    dim: int  # of a head
    weights: int  # parameters

    def cache_bytes(self, batch: int, context: int, itemsize: int = 2) -> int:
        """Keys and values of `batch` sequences of `context` tokens."""
        return 2 * batch * context * self.layers * self.kv_heads * self.dim * itemsize


OPT_13B = Decoder(40, 40, 40, 128, 12_853_000_000)


class Machine(NamedTuple):
    """Rates in bytes per second, compute in operations per second."""

    gpu_memory: float  # reading the GPU's own memory
    gpu_compute: float
    host_link: float  # host memory to GPU
    ssd_link: float  # drives to GPU, file system included
    flash: float  # inside one drive, from all its flash to its controllers; whole pages cross here
    drive_compute: float  # of one drive's attention engine
    drives: int = 1  # over which heads are spread; they share the link


# an RTX A6000 on PCIe 4.0 x16; a drive with 8 channels of 1.4 GB/s
A6000_HOST = Machine(768e9, 155e12, 20e9, 4e9, 11.2e9, 0.5e12)


class Step(NamedTuple):
    """One decoding step of a batch. Seconds, but for the bytes."""

    linear: float  # projections and feed-forward on the GPU
    cache: float  # reading the cache and moving it, or attending where it lies
    exchange: float  # queries, new keys and values, and attention outputs between GPU and drive
    moved: int  # bytes over the link to the GPU
    read: int  # bytes out of the medium that holds the cache

    @property
    def seconds(self) -> float:
        return self.linear + self.cache + self.exchange

    @property
    def cache_share(self) -> float:
        """Of the step's time, what access to the cache takes."""
        return self.cache / self.seconds


class Sparse(NamedTuple):
    """How much of the cache SparF reads."""

    channels: float = 1 / 8  # r / D of every key
    tokens: float = 1 / 8  # of all tokens, that pass the controller's filter
    pages: float = 0.6  # of all pages, that hold one of these


def offload_step(
    model: Decoder, batch: int, context: int, where: str, sparse: Sparse | None = None, *, machine: Machine = A6000_HOST,
    itemsize: int = 2,
) -> Step:  # fmt: skip
    """What one decoding step takes when the cache lies in `where`: each part is the slower of moving and computing.

    gpu, host, ssd attend on the GPU: the cache crosses the link (but for gpu) and is read once. csd attends in the drive:
    q, k, v go down and outputs come back, and the flash is read at its internal rate. With `sparse` a drive reads the
    channels of step one and whole pages of step two, for its controllers filter tokens; what attends on the GPU moves
    channels and tokens.

    Args:
        model, machine: sizes and rates.
        batch, context: sequences, and tokens of each.
        where: "gpu", "host", "ssd" or "csd".
        sparse: None reads all.
    Raises:
        ValueError: an unknown place, sizes below 1, shares outside [0, 1].
    Source: the argument of arXiv:2409.04992, sections II and V; a roofline instead of its system.
    """
    check.one_of("offload_step", PLACES, where=where)
    check.at_least("offload_step", 1, batch=batch, context=context)
    if sparse is not None:
        check.within("offload_step", 0.0, 1.0, **sparse._asdict())
    whole, vectors = model.cache_bytes(batch, context, itemsize), batch * model.layers * model.dim * itemsize
    keys, both = (0.0, 1.0) if sparse is None else (sparse.channels / 2, sparse.tokens)
    pages = both if sparse is None else sparse.pages
    passed, read = round(whole * (keys + both)), round(whole * (keys + pages))
    share = model.heads / model.kv_heads  # query heads that use each byte
    work = 2 * share * passed / itemsize
    linear = max(model.weights * itemsize / machine.gpu_memory, 2 * model.weights * batch / machine.gpu_compute)
    if where == "csd":
        moved = vectors * 2 * (model.heads + model.kv_heads)
        time = max(read / machine.flash, work / machine.drive_compute) / machine.drives
        return Step(linear, time, moved / machine.ssd_link, moved, read)
    link = {"gpu": float("inf"), "host": machine.host_link, "ssd": machine.ssd_link}[where]
    time = max(passed / link, passed / machine.gpu_memory, work / machine.gpu_compute)
    return Step(linear, time, 0.0, 0 if where == "gpu" else passed, passed)


def shadow_bytes(
    length: int, kv_heads: int, dim: int, *, rank: int = 160, chunk: int = 8, outliers: int = 48, local: int = 4,
    budget: int = 2048, itemsize: int = 2,
) -> dict[str, int]:  # fmt: skip
    """What ShadowKV holds of one sequence and layer, by part; all but "slow" is in fast memory.

    "factors" are U and SV, "landmarks" the mean keys of the listed chunks, "outliers" and "local" what is kept exactly,
    "fetched" the buffer of a step, "slow" the values of the chunks.
    The indices of chunks are not counted.

    Raises:
        ValueError: a prompt too short for its outliers.
    Source: arXiv:2410.21465, section 4.
    """
    chunks = length // chunk - local
    check.at_least("shadow_bytes", outliers + 1, f"{length} tokens make {chunks} chunks", chunks=chunks)
    token = kv_heads * dim * itemsize  # one token's keys, or values
    return {
        "factors": rank * (chunks * chunk * itemsize + token),
        "landmarks": (chunks - outliers) * token,
        "outliers": 2 * outliers * chunk * token,
        "local": 2 * (length - chunks * chunk) * token,
        "fetched": 2 * budget * token,
        "slow": chunks * chunk * token,
    }
