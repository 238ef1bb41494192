"""LeNet sweeps: composed by Hydra, trained by one loop, tracked in MLflow, reproducible to the bit."""

import os

# OpenMP threads synchronise many times in one step. By default a waiting thread spins for milliseconds. On a
# machine with other work, that keeps the thread it waits for off its core: training was 10 % slower. A spin
# of a few microseconds costs nothing on an idle machine. torch reads this variable when it is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
