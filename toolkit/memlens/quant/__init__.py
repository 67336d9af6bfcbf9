"""Numbers in few bits: the one quantizer core, and the formats that stand on it."""

from memlens.lazy import attach

_HOMES = {
    "QTensor": "core", "container": "core", "dequantize": "core", "pack": "core", "quantize": "core",
    "storage_bits": "core", "unpack": "core", "bfp": "blockfloat",
}  # fmt: skip
_MODULES = ("blockfloat", "core")
__all__, __getattr__, __dir__ = attach(__name__, _HOMES, _MODULES)
