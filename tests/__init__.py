"""The tests. Some repeat what they do more often with LONG=1 in the environment: `make soak`."""

from __future__ import annotations

import os

LONG = os.environ.get("LONG") == "1"
