"""Benchmarks: tables of medians and ratios, contestants alternating in one run. Nothing here is a timed test."""
