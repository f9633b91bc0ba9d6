"""The native module under AddressSanitizer and UndefinedBehaviorSanitizer: ``python -m tests.sanitizers``."""
