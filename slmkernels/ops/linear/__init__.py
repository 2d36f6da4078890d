"""Linear attention: one recurrence, from plain linear attention to Kimi Delta Attention."""
