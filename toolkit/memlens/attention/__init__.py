"""Attention: exact, merged from parts, masked, sparse, and rotary positions."""
