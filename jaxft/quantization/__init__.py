"""Quantized storage of frozen linear weights: `qtensor` holds them, one module per codec fills them."""
