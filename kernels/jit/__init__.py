"""The kernels in Triton, each imported where it is launched: Triton need not be installed."""
