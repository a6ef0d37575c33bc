"""What a sweep leaves, and other people's tables, as typed rows. No torch, no Ray."""
