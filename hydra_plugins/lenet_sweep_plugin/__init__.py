"""lenet_sweep's Hydra plugin."""
