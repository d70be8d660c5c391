"""Registered ops, their autograd, and the public functions on top of them; `kernels` does the device work."""
