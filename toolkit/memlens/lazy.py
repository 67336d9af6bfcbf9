"""Packages whose parts load on first use, so that importing memlens imports nothing else."""

from importlib import import_module

__all__ = ["attach"]


def attach(package: str, homes: dict[str, str], modules: tuple[str, ...] = ()) -> tuple:
    """The `__all__`, `__getattr__` and `__dir__` of a package; needs nothing that Python has not loaded anyway.

    Args:
        package: its `__name__`.
        homes: for each public name, the module of the package that defines it.
        modules: modules of the package that are public as they are.
    """
    names = [*homes, *modules]

    def getattr_(name: str):
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")

    return names, getattr_, lambda: sorted(names)
