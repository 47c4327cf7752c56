"""TensorRT-LLM's connector interface: the installed one, else one like it in our own words.

A connector derives from two classes, and is handed `RequestData` and `SchedulerOutput`.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

NEW = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"
OLD = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"
INSTALLED = importlib.util.find_spec("tensorrt_llm") is not None


class KvCacheConnectorScheduler(ABC):
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> Any: ...

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]: ...

    @abstractmethod
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool: ...

    @abstractmethod
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None: ...


class KvCacheConnectorWorker(ABC):
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        self._metadata: Any = None

    def bind_connector_meta(self, metadata: Any) -> None:
        self._metadata = metadata

    def get_connector_meta(self) -> Any:
        return self._metadata

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: Any) -> None: ...

    @abstractmethod
    def start_load_kv(self, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_save(self, stream: Any) -> None: ...

    @abstractmethod
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]: ...


@dataclass
class RequestData:
    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int
    priorities: list[int] | None = None


@dataclass
class SchedulerOutput:
    new_requests: list[Any] = field(default_factory=list)
    cached_requests: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def provided(location: str = NEW, version: str = "1.4.0") -> Iterator[types.SimpleNamespace]:
    """The interface can be imported meanwhile; what is given says on which rank the caller is."""
    here = types.SimpleNamespace(rank=0)
    if INSTALLED:
        with mock.patch("tensorrt_llm._utils.mpi_rank", side_effect=lambda: here.rank):
            yield here
        return
    before = dict(sys.modules)
    parts = location.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
        sys.modules[module.__name__] = module
    sys.modules["tensorrt_llm"].__version__ = version  # type: ignore[attr-defined]
    sys.modules["tensorrt_llm._utils"] = types.ModuleType("tensorrt_llm._utils")
    setattr(sys.modules["tensorrt_llm._utils"], "mpi_rank", lambda: here.rank)  # noqa: B010
    for name in ("KvCacheConnectorScheduler", "KvCacheConnectorWorker", "RequestData", "SchedulerOutput"):
        setattr(sys.modules[location], name, globals()[name])
    try:
        yield here
    finally:
        for name in set(sys.modules) - set(before):
            if name.startswith(("tensorrt_llm", "kvbm.trtllm_integration")):
                del sys.modules[name]
                parent, _, own = name.rpartition(".")
                if parent in sys.modules:
                    vars(sys.modules[parent]).pop(own, None)
