"""Kernel budgets, sweeps, plots, checks on a GPU; each runs as ``python -m perf.<name>``."""
