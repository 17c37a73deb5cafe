"""Names that lightning-habana imports."""

from habana_frameworks.mediapipe import placeholder


def __getattr__(name: str) -> type:
    return placeholder(name)
