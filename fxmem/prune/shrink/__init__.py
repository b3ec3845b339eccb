"""From masks to smaller models."""
