"""A look inside one network: activations, confident errors, plots of a run, predictions for image files.

May import: tracking, storage, training, datasets, config, shapes, errors, paths.
"""
