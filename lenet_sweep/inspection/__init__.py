"""Inspection of one network: activations, confident errors, plots, predictions for image files.

May import: tracking, storage, training, datasets, config, shapes, errors, paths.
"""
