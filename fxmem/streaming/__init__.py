"""Labels, loops and bodies: how a traced region is cut along the sequence."""
