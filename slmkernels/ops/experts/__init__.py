"""Sparse expert routing: scores to experts (`route`), experts to outputs (`expert_mlp`, `segment_mlp`)."""
