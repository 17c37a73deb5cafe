"""``torch.compile`` in eager mode."""
