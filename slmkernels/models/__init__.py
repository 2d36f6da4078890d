"""The reference small language model."""

from .small_lm import PRESETS, SmallLM, SmallLMConfig

__all__ = ["PRESETS", "SmallLM", "SmallLMConfig"]
