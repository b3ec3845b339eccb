"""Models whose parameters are spread over several processes."""
