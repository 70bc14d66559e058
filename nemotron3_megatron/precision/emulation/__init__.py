"""Quantised GEMMs on hardware without them: operands quantised and dequantised around BF16 or FP32 products."""
