"""Everything that can change a number, and nothing else: data, network, backends, optimizer, the loop.

The code version in every config hash is computed from all sources of this room and shapes.py (see
`storage.fingerprint`). The loop is `engine.train`; a gradient step is in `backend`, `native` or `fused_step`.

May import: datasets, config, shapes, errors, paths.
"""
