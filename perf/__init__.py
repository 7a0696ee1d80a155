"""Benchmarks, kernel budgets and sweeps; not installed with the package."""
