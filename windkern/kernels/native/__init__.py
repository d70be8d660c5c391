"""Row kernels in C++ and CUDA from csrc/, called through their extension modules."""
