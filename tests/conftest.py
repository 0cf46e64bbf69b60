"""What every test needs, however pytest was started."""

from __future__ import annotations

import signal

# A background job of a non-interactive shell ignores SIGINT, and so would every process that a test starts
# to interrupt.  A handler, unlike being ignored, is not inherited over exec.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
