"""The most memory that a block takes at once: Python's and numpy's objects, and Arrow's buffers."""

import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import pyarrow as pa


@contextmanager
def counted_memory():
    """Count while the block runs; `bytes` of what is handed over is the peak afterwards."""
    found, before = SimpleNamespace(bytes=0), pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield found
        found.bytes = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
