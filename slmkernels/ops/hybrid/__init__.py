"""Hybrid attention: softmax over the near keys and linear attention over the far ones, one normaliser."""
