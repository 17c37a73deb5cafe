"""Fast `trainer.predict` on Intel Gaudi (HPU) for PyTorch Lightning."""

__version__ = "0.1.0"

__all__ = ["__version__"]
