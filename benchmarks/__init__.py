"""Programs that measure: accuracy, speed, resources of compiled kernels, whole training steps."""
