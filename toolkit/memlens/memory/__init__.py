"""Recurrent state: linear attention with decays and the delta rule, state-space scans, short convolutions, and hybrids."""
