"""What fits before anything runs: memory and time of training steps from shapes alone."""
