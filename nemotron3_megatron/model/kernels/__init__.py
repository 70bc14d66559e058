"""Triton kernels of the model: CUDA only, imported where they are used."""
