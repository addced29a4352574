"""What a server of runs imports first: a session of its own, where signals to the group of whoever
started it don't come. Those that came on the way, while they were blocked, are forgotten: what is
imported next may unblock them."""

from __future__ import annotations

import os
import signal

from fastkd.signals import STOPPING

os.setsid()
for number in STOPPING:
    signal.signal(number, signal.signal(number, signal.SIG_IGN))
