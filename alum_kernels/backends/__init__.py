"""How an op is computed on a device: one folder a backend, the same file names in each."""

FUSED_DIVERGENCES = ("symmetric_kl", "kl")
"""Those that the native and the Triton kernels know; the reference serves all."""
