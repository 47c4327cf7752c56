"""The suite of every RecordStore, over the disk store in its variants."""

from functools import partial

import pytest

from tests.storage.conformance import Conformance
from tests.storage.harness import Backend, needs_nixl, open_disk, open_nixl

BACKENDS = [
    Backend("direct", open_disk),
    Backend("buffered", partial(open_disk, o_direct=False)),
    Backend("two-directories", partial(open_disk, directories=2)),
    Backend("nixl-posix", open_nixl),
]


class TestDiskStore(Conformance):
    @pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
    def backend(self, request: pytest.FixtureRequest) -> Backend:
        if request.param.name == "nixl-posix":
            needs_nixl()
        return request.param
