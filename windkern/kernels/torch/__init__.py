"""Row kernels in plain PyTorch: the readable back end, on any device."""
