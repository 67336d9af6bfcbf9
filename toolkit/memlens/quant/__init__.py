"""Numbers in few bits: the one quantizer core, and the formats that stand on it."""

from importlib import import_module

_HOMES = {
    "QTensor": "core", "container": "core", "dequantize": "core", "pack": "core", "quantize": "core",
    "storage_bits": "core", "unpack": "core", "bfp": "blockfloat",
}  # fmt: skip
_MODULES = ("blockfloat", "core")
__all__ = [name for names in (_HOMES, _MODULES) for name in names]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
