"""All code that can change a result: data, network, backends, optimizers and the training loop.

The training loop is `engine.train`. A gradient step is computed in `backend`, `native` or `fused_step`. The
code version in every config hash covers all sources of this package and shapes.py (`storage.fingerprint`).

May import: datasets, config, shapes, errors, paths.
"""
