"""Finding the device."""


def is_habana_available() -> bool:
    """Tell whether there is a device."""
    return True
