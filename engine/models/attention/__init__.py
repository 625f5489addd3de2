"""Attention, a file an implementation."""

from engine.models.attention.tiles import attend

__all__ = ["attend"]
