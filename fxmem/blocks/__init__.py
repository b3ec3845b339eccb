"""Block training: which parameters learn in a step, and what the backward does with the others.

BAdam: arXiv 2404.02827; BREAD: Luo et al., NeurIPS 2025.
"""
