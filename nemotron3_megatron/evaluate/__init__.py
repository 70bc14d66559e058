"""Using trained checkpoints: generation."""
