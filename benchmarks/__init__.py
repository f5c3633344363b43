"""Measurements side by side: `python -m benchmarks.training`, and its tables for the README."""
