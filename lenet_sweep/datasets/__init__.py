"""The datasets: catalogue of files and checksums, sources, download and verification.

May import: config, shapes, errors, paths.
"""
