"""The search for masks."""
