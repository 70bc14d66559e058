"""Text to indexed tokens: ``python -m data_prep recipe=NAME [key=value ...]``."""
