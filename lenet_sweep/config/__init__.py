"""The config: types and ranges of all fields, conversion from plain values to dataclasses and back.

The values are in conf/*.yaml. A config is data: nothing named in one is imported or instantiated.

May import: shapes, errors, paths.
"""
