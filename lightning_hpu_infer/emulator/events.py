"""Events of the device that programs may subscribe to: ``_event_dispatcher_C`` of the bridge."""

from __future__ import annotations

import datetime
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Params = Sequence[tuple[str, str]]
Callback = Callable[[datetime.datetime, Params], None]


class EventId(enum.Enum):
    """What can happen; names and values are the bridge's (bridge: event_dispatcher.h, its bindings.cpp)."""

    GRAPH_COMPILATION = 0
    MARK_STEP = 1
    PROCESS_EXIT = 2
    DEVICE_ACQUIRED = 3
    CUSTOM_EVENT = 4
    MEMORY_DEFRAGMENTATION = 5
    CPU_FALLBACK = 6
    CACHE_HIT = 7
    CACHE_MISS = 8


@dataclass(frozen=True, eq=False)
class EventDispatcherHandle:
    """What `EventDispatcher.subscribe` returns and `EventDispatcher.unsubscribe` takes."""

    topic: EventId
    callback: Callback


class EventDispatcher:
    """Calls subscribers in the thread in which something happens, which may be a thread of the device."""

    def __init__(self) -> None:
        self._handles: dict[EventId, list[EventDispatcherHandle]] = {topic: [] for topic in EventId}

    @staticmethod
    def instance() -> EventDispatcher:
        """Return the dispatcher of this process."""
        return _instance

    def subscribe(self, topic: EventId, callback: Callback) -> EventDispatcherHandle:
        """Call `callback` with a time and pairs of strings whenever `topic` happens."""
        handle = EventDispatcherHandle(topic, callback)
        self._handles[topic].append(handle)
        return handle

    def unsubscribe(self, handle: EventDispatcherHandle) -> None:
        """Call it no more; a handle that is not subscribed is ignored."""
        if handle in self._handles[handle.topic]:
            self._handles[handle.topic].remove(handle)

    def unsubscribe_all(self) -> None:
        """Forget every subscriber."""
        for handles in self._handles.values():
            handles.clear()

    def has_subscribers(self, topic: EventId) -> bool:
        """Tell whether anybody listens; publishing otherwise costs time and does nothing."""
        return bool(self._handles[topic])

    def publish(self, topic: EventId, params: Params, timestamp: datetime.datetime | None = None) -> None:
        """Call the subscribers of `topic`."""
        for handle in tuple(self._handles[topic]):
            handle.callback(timestamp or datetime.datetime.now(), params)


_instance = EventDispatcher()
