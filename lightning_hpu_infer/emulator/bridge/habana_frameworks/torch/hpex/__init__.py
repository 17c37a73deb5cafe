"""Habana's extensions; only what lightning-habana imports."""
