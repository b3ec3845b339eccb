"""Block training: which parameters learn in a step, and what the backward does with the others."""
