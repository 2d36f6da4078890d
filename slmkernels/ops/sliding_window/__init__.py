"""Sliding-window softmax attention."""
