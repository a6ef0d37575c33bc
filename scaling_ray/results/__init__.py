"""Files and results of a sweep, other people's tables, and the laws fitted to both. No torch, no Ray."""
