"""From a model to traced regions."""
