"""Sweeps of LeNet: composed by Hydra, trained by one loop, tracked in MLflow, reproducible to the bit."""
