"""One run, or several as one array: preflight, session, resume, outputs, progress, reproduction.

May import: inspection, tracking, storage, training, datasets, config, shapes, errors, paths.
"""
