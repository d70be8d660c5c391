"""Row kernels in C++ and CUDA from csrc/, by the Python modules of their extensions."""
