"""What a training step is: perturbation, objectives, telemetry. No kernels here."""
