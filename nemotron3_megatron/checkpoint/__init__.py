"""Checkpoints: complete or absent, readable by any layout, a restart bitwise where the layout is the same."""
