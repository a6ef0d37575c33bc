"""Training of one run: a loop over any engine, exact checkpoints, and the worker-group edge."""
