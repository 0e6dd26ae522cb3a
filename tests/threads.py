"""How many threads torch takes in the tests: one, so that two processes fit two cores; portable.py asks for two."""

from __future__ import annotations

import os

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
