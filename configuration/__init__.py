"""The configuration of a Lamoe model and the published shapes; imports no torch."""

from lamoe.configuration.configuration_lamoe import LamoeConfig

__all__ = ["LamoeConfig"]
