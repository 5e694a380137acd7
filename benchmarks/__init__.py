"""Measurements, started by ``make bench``; figures and the machines they are from: ``docs/benchmarks.md``."""
