"""The command line and the cores of our Hydra plugins: the only package that imports Hydra.

May import: all others.
"""
