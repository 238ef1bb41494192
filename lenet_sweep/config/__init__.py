"""The config: types, ranges, and the way from plain values to checked dataclasses and back.

Values are in conf/*.yaml. A config is data: nothing that it names is imported or instantiated here.

May import: shapes, errors, paths.
"""
