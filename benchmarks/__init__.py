"""Measurements, side by side and interleaved; never run as tests."""
