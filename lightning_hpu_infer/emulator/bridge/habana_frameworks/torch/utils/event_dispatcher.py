"""Events of the device that programs may subscribe to."""

from habana_frameworks.torch.utils._event_dispatcher_C import EventDispatcher, EventId

__all__ = ["EventDispatcher", "EventId"]
