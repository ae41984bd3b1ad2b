"""What the callbacks of both frameworks share: when to measure, on what, and what is drawn of it."""
