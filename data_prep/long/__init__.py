"""Long documents, made of short ones."""
