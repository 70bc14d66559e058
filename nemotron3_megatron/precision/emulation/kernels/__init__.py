"""Triton kernels of quantised reads: one for the amax of NVFP4, one that quantises NVFP4, one that quantises MXFP8."""
