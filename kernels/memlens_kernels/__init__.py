"""Triton kernels and their launchers. Nothing here imports memlens; dispatch and autograd live in the library."""
