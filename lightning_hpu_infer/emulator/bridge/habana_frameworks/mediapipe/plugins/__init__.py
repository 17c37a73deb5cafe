"""Names that lightning-habana imports."""
