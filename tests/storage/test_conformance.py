"""The suite of every RecordStore, over the disk store in its variants."""

from functools import partial

import pytest

from tests.storage.conformance import Conformance
from tests.storage.harness import Backend, open_disk

BACKENDS = [
    Backend("direct", open_disk),
    Backend("buffered", partial(open_disk, o_direct=False)),
    Backend("two-directories", partial(open_disk, directories=2)),
]


class TestDiskStore(Conformance):
    @pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
    def backend(self, request: pytest.FixtureRequest) -> Backend:
        return request.param
