"""SLURM: run directories that start themselves again, chains of segments, and what became of them."""
