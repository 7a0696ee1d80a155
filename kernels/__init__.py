"""Triton kernels and their launchers; installed as ``tritonloss.kernels``."""

if __name__ != "tritonloss.kernels":
    # From a checkout's root they would be there twice, with two sets of compiled kernels
    raise ImportError(f"{__name__} is tritonloss.kernels: import that")
