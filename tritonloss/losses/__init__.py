"""Public loss functions, one file per family."""
