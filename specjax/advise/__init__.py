"""Advises a method and settings for the user's data, model and hardware, by published rules and without training."""
