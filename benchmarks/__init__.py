"""Benchmarks: one registry of cases, one runner, one report. `python -m benchmarks --help`."""
