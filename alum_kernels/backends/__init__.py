"""How an op is computed on a device: one folder a backend, the same file names in each."""
