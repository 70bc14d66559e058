"""The model: layer pattern -> Megatron-Core HybridModel, with torch and Transformer Engine module specs."""
