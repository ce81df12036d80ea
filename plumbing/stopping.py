"""SIGTERM and Ctrl-C: noted by a handler, obeyed where the run can stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

NOTED = (signal.SIGTERM, signal.SIGINT)
# TRAP: one Ctrl-C reaches a process twice within milliseconds: the terminal signals all of its
# processes, and so does torchrun. A batch system does the same with SIGTERM.
SAME_REQUEST_SECONDS = 2.0


class Stopped(Exception):
    """The run ends here, because a signal asked for it."""

    def __init__(self, number: int):
        super().__init__(signal_name(number))
        self.name, self.exit_code = signal_name(number), exit_code(number)


def signal_name(number: int) -> str:
    """SIGTERM, or Ctrl-C for SIGINT."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def exit_code(number: int) -> int:
    """The code that a shell reports for a process that a signal ended: 143 or 130."""
    return 128 + number


class StopSignals:
    """Which signal asked this process to stop: `number`, 0 where none has.

    The first one is only noted. The run looks at `number` and stops where it can. A second one ends
    the process at once, unless it comes within SAME_REQUEST_SECONDS of the first.
    """

    def __init__(self):
        self.number, self.noted_at, self.prints = 0, 0.0, False

    @contextlib.contextmanager
    def noted(self, prints: bool) -> Iterator[None]:
        """Note signals inside the block. prints: say that one was noted (the main process)."""
        self.prints = prints
        previous = {number: signal.signal(number, self.handle) for number in NOTED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame=None) -> None:
        """The handler of both signals."""
        if not self.number:
            self.number, self.noted_at = int(number), time.monotonic()
            self.write(
                f"{signal_name(number)}: stopping soon, and keeping what is done; again: at once"
            )
        elif time.monotonic() - self.noted_at > SAME_REQUEST_SECONDS:
            self.write(f"{signal_name(number)} again: stopped at once, without a checkpoint")
            with contextlib.suppress(RuntimeError):  # the signal came while stdout was written
                sys.stdout.flush()
            os._exit(exit_code(number))  # an exception could be held up by another process

    def write(self, line: str) -> None:
        """One line on stderr. TRAP: print() inside a handler can meet a print() that it broke."""
        if self.prints:
            os.write(2, f"\n{line}\n".encode())


@contextlib.contextmanager
def interrupt_in_one_line() -> Iterator[None]:
    """Ctrl-C inside the block ends the program with one line and exit code 130, no traceback."""
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # all processes get it; the main one speaks
            print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(exit_code(signal.SIGINT))
