"""These tests run the Triton kernels in Triton's interpreter.

It must be switched on before Triton is imported, and while it is on nothing else can be compiled,
so they run in a process of their own: ``tests/kernels/test_kernels_interpreted.py`` starts it.
By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
