"""Random calls of every op on every backend, each judged against float64: ``python -m tests.fuzzing``."""
