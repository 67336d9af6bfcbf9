"""Notebooks as they are run, stored, checked and handed out; the ledger of their verdicts, the README and the gallery."""
