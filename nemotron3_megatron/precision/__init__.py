"""Per-layer precision: number formats, policies, plans and their backends."""
