"""The command line and Hydra: the only room that imports Hydra.

May import: all others.
"""
