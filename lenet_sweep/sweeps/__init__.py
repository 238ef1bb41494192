"""A sweep: its plan, the groups that are trained together, the executors that train them, its summary.

May import: runs, analysis, inspection, tracking, storage, training, datasets, config, shapes, errors, paths.
"""
