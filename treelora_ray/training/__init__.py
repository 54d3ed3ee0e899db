"""Training and evaluation of task streams."""
