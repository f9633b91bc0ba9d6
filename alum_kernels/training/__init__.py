"""A training loop that can be stopped anywhere and goes on bit for bit, for standard and adversarial training alike."""
