"""Routing and experts in Triton: tile choice, launchers, operator registration."""
