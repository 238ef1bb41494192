"""Benchmarks. Their measurements are interleaved, and they never run as tests."""
