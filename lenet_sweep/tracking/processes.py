"""Tags that identify the process of a run, and whether that process still runs."""

import os
import socket

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
