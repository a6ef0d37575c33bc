"""Runs on a tracking server, from their own files."""
