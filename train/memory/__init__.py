"""Peak memory of a training run, before it starts.

`estimate` runs one training step on tensors without data (`step.py`) under a mode that accounts for every storage alive
(`ledger.py`), with stand-ins for what runs on GPUs only (`kernels.py`, `quantised.py`, `optimizers.py`). `checks.py`
compares it with measured runs; `report.py` makes the tables and memory.md.
"""

from .peak import estimate, meta_model
from .quantised import packed_bytes
from .result import GIB, MemoryEstimate, print_memory

__all__ = ["GIB", "MemoryEstimate", "estimate", "meta_model", "packed_bytes", "print_memory"]
