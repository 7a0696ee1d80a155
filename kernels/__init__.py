"""Triton kernels and their launchers; installed as ``tritonloss.kernels``."""
