"""Doors into other libraries: transformers, and functions with the names of fla and FlashAttention."""
