"""How weights can be stored, by name: dtypes of torch and formats of bitsandbytes."""

from __future__ import annotations

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes of weights, under torch's own names."""
QUANTIZED = ("int8", "nf4")
"""Formats of bitsandbytes, which serve teachers only and need CUDA."""
