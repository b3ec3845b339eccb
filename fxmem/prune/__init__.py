"""Structured pruning: coupling, sub-models and mask search."""
