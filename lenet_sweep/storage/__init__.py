"""What a run leaves in its folder and what is found there again: metrics, checkpoint, result, manifest.

Also the fingerprint of a config and the index of all runs of a folder.

May import: training, datasets, config, shapes, errors, paths.
"""
