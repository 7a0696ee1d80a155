"""The same maths in plain PyTorch: the reference for the kernels, and the CPU path."""
