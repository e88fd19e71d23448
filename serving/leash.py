"""Runs a program that must not outlive its keeper: `python leash.py PROGRAM ARGUMENT...`, standard input a pipe.

The keeper holds the pipe's other end. However the keeper ends, kill -9 included, the pipe is closed with it; then this
process kills its whole process group, the program and all that it started. Otherwise it ends as the program does. It is
run as a file, with nothing but the standard library.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Runs the program that the command line names."""
    # Signals for the group reach the program too, whose end is waited for. A handler, unlike SIG_IGN, is not inherited.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    program = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_kill_with_keeper, daemon=True).start()
    code = program.wait()
    if code < 0:  # ended by a signal: so is this process, that the keeper sees it
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _kill_with_keeper() -> None:
    while os.read(0, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
