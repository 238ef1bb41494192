"""The process of a run: tags that identify it, whether it still runs, and interrupts that it defers."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def tags() -> dict[str, str]:
    """Tags that identify this process: host, pid and its start in seconds since 1970."""
    started = psutil.Process().create_time()
    return {"host": socket.gethostname(), "pid": str(os.getpid()), "process_start": f"{started:.2f}"}


def is_alive(tags: dict[str, str]) -> bool:
    """Whether the process that these tags name still runs; its number alone may be reused by now."""
    try:
        process = psutil.Process(int(tags["pid"]))
        same = abs(process.create_time() - float(tags["process_start"])) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, ValueError, psutil.NoSuchProcess):
        return False
    except psutil.AccessDenied:
        return True


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until the end of the block, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {
        sign: signal.signal(sign, lambda sign, frame: caught.append(sign))
        for sign in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    for number in caught[:1]:
        signal.raise_signal(number)
