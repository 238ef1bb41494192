"""Where runs are tracked: MLflow, or output folders alone. The only room that imports mlflow.

`base` has the two protocols that a tracking backend implements.

May import: storage, training, datasets, config, shapes, errors, paths.
"""
