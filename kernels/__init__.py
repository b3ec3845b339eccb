"""Hot operations, one per file: the canonical op, its plain PyTorch reference and its chunk form.
"""
