"""Every kernel test runs in Triton's interpreter, and whatever a kernel forgets to write shows."""

import pytest
import torch

from memlens import backend


@pytest.fixture
def interpreted(monkeypatch):
    """Skips without the interpreter; new tensors come filled with NaN, integers with -7."""
    if not backend.interpreting():
        pytest.skip("needs TRITON_INTERPRET=1 before Python starts")

    def soiled(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.dtype == torch.bool:
                return out
            return out.fill_(torch.nan if out.is_floating_point() else -7 if out.dtype.is_signed else 77)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, soiled(getattr(owner, name)))
