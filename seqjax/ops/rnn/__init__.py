"""Whole-sequence implementations of the Elman recurrence."""
