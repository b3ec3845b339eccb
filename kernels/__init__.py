"""Hot operations, one per file: the canonical op, its PyTorch reference and its chunk form."""
