"""Sweeps of LeNet: composed by Hydra, trained by one loop, tracked in MLflow, reproducible to the bit."""

import os

# OpenMP's threads wait for each other many times in a step. By default they spin for milliseconds, which
# on a machine that has other work to do keeps the awaited thread from its core: a tenth of the speed was
# measured. A few microseconds are as good where nobody else is. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
