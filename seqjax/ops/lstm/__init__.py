"""Whole-sequence implementations of the LSTM."""
