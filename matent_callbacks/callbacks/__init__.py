"""What the callbacks of both frameworks share: what they measure and when, and what they draw of it."""
