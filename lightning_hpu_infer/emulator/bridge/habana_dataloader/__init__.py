"""Habana's data loader; lightning-habana imports it, the emulator has no media engine."""
