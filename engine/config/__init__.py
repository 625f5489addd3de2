"""Run files and their options: frozen dataclasses that check themselves."""
