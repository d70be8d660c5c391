"""Registered ops, autograd and the public functions over them; `kernels` does the device work."""
