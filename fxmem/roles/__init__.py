"""What a step does with each parameter."""
