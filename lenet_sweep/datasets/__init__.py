"""Datasets as verified files: what they are, where they come from, how they are fetched.

May import: config, shapes, errors, paths.
"""
