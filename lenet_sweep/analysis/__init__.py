"""Many runs after the fact: selection, statistics, tables, the report, MLflow's pages.

May import: inspection, tracking, storage, training, datasets, config, shapes, errors, paths.
"""
