"""Row kernels in Triton: `rows` is the back end, with the whole contract in its `__all__`."""
