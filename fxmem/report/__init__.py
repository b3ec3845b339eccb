"""What ``explain`` tells."""
