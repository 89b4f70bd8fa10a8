"""Kernels for NVIDIA GPUs: CUDA C++ of the folder `cuda`, compiled by NVRTC where it runs, through CuPy.

Nothing here imports CuPy before a kernel is wanted. `compile` turns a source into a function of tensors, `half_pyramid`
and `hadamard` are the operations.
"""
