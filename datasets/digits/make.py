"""Makes digits.safetensors from scikit-learn's copy of the digits.

python datasets/digits/make.py          # needs `pip install scikit-learn`
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from memlens.data import cards

HERE = Path(__file__).parent


def main() -> None:
    """Write images and labels as bytes, and bring the card up to date."""
    stored = load_digits()
    tensors = {"images": stored.images.astype(np.uint8), "labels": stored.target.astype(np.uint8)}
    if not np.array_equal(tensors["images"], stored.images):
        raise SystemExit("the pixels are no whole numbers 0..255")
    save_file(tensors, HERE / "digits.safetensors")
    (HERE / "digits.safetensors").chmod(0o644)
    cards.update("digits")


if __name__ == "__main__":
    main()
