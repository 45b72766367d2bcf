"""What holds for every test."""

from __future__ import annotations

import signal

# Started under nohup everything would ignore a terminal that is closed, and so would the programs that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
