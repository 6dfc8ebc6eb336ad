"""Whole-sequence implementations of the GRU."""
