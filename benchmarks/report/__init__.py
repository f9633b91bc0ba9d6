"""One HTML page from the result files of the benchmarks, and from nothing else: ``python -m benchmarks.report``."""
