"""Batches of many lengths: padded to few, or put in order of length, and nobody can tell."""
