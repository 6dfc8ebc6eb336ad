"""Whole-sequence implementations of a cell's recurrence, and the choice between them."""
