"""Structured pruning: coupled units of a model, masks over them, really smaller sub-models."""
