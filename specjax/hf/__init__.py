"""Hugging Face folders, in and out, by one table of names."""
