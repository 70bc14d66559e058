"""A precision plan put into force in built models, natively or emulated."""
