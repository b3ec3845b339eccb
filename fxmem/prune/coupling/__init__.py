"""Which channels must be removed together."""
