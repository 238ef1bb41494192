"""Analysis of recorded runs: selection, statistics, tables, plots, the report, MLflow's pages.

May import: inspection, tracking, storage, training, datasets, config, shapes, errors, paths.
"""
