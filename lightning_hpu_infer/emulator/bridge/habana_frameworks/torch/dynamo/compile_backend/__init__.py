"""The backend of ``torch.compile``; importing it registers it, which ``htcore`` does in eager mode."""

from habana_frameworks.torch.dynamo.compile_backend import backends

__all__ = ["backends"]
