"""Outputs that leave the captured call as a promise, and what is done with them meanwhile."""
