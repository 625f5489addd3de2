"""Tests, in folders like the code's."""
