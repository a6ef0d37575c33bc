"""Scaling laws for single-cell models: cells in, a law with intervals one can defend out."""

__version__ = "0.1.0"
