"""How a trainer that already exists uses the adversarial objective; each module imports its own framework."""
