"""The exceptions that KVBM raises to its user. Every message says what to do next.

They leave at start-up and from the Python API only: on an engine's data path a failure is a cache miss. The
one exception is `LostLoadError`.
"""


class KvbmError(Exception):
    """Base of all errors that KVBM raises on purpose."""


class ConfigError(KvbmError):
    """A setting has a wrong value, an unknown name, or contradicts another one."""


class CapacityError(KvbmError):
    """There is too little memory for what was configured."""


class UnsupportedEngineError(KvbmError):
    """The engine's version lies outside the range that this version of KVBM supports."""


class LayoutError(KvbmError):
    """The engine's KV tensors have a layout that KVBM does not recognise."""


class UsageError(KvbmError):
    """The library was called in a way that its contract forbids."""


class StateError(UsageError):
    """It was called rightly, but what is wanted can't be had in the present state."""


class StorageError(KvbmError):
    """A storage tier can't be used, or one of its transfers failed."""


class DamagedRecordError(StorageError):
    """A stored record is not what was written."""


class TraceError(KvbmError):
    """A trace of requests can't be read, or none can be written where it was wanted."""


class LostLoadError(KvbmError):
    """The engine computes on a load that can't be made in any way: its output would be wrong."""
