"""Lets model files write `from .configuration_lamoe import LamoeConfig`, here and in a saved code bundle.

Saving a model copies the real configuration file over this one.
"""

from lamoe.configuration.configuration_lamoe import LamoeConfig

__all__ = ["LamoeConfig"]
