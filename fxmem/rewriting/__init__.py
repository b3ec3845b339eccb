"""One runner for rewrites, and the checks between them."""
