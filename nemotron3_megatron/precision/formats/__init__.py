"""Block-scaled number formats, defined bit by bit in torch on any device: the reference for every kernel.

``nvfp4`` and ``mxfp8`` quantise; ``e2m1`` (4-bit floats, rounding to nearest and stochastic) and ``hadamard`` are their
parts. docs/formats.md says what is compared with what.
"""
