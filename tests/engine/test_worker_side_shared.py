"""A rank finds the host tier of the first, or says why it has none; whatever fails, nobody waits for ever."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvbm.config import load_config
from kvbm.errors import CapacityError
from kvbm.runtime import rank as rank_module
from kvbm.transfer.arena import ArenaHandle
from kvbm.vllm_integration import compat
from kvbm.vllm_integration import worker as worker_module
from kvbm.vllm_integration.identity import Geometry
from kvbm.vllm_integration.worker import WorkerSide
from tests.engine.test_worker_side import ANNOUNCED, BLOCKS, NAMES, SHAPE


class Ranks:
    """Two of them, one after the other in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[Any] = []
        monkeypatch.setattr(compat, "from_first_rank", self._from_first_rank)
        monkeypatch.setattr(worker_module, "geometry", lambda *_: Geometry(4, 48, BLOCKS, 2, shared=True))
        self.first, self.second = (
            WorkerSide(
                SimpleNamespace(parallel_config=SimpleNamespace(rank=rank)),
                ANNOUNCED,
                load_config(environ={}, host__num_blocks=8),
            )
            for rank in (0, 1)
        )

    def _from_first_rank(self, value: Any) -> Any:
        self.told.append(value)
        return self.told[0]

    def register(self, side: WorkerSide) -> str | None:
        side.register({name: torch.zeros(SHAPE, dtype=torch.uint8) for name in NAMES})
        report = side.report()
        return report.refused if report is not None else None


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def test_both_use_the_same_memory(ranks: Ranks) -> None:
    assert [ranks.register(ranks.first), ranks.register(ranks.second)] == [None, None]
    first, second = (side._worker.arena.handle for side in (ranks.first, ranks.second) if side._worker)
    assert isinstance(ranks.told[0], ArenaHandle)
    assert (first.device, first.inode) == (second.device, second.inode)
    ranks.first.close()
    ranks.second.close()


@pytest.mark.parametrize("error", [CapacityError("too big"), RuntimeError("no such call")])
def test_a_first_rank_without_a_tier(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The others hear of it also where the engine's start fails."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(rank_module, "make_copy_engine", fail)
    if isinstance(error, CapacityError):
        with pytest.raises(CapacityError):
            ranks.register(ranks.first)
    else:
        assert "no such call" in str(ranks.register(ranks.first))
    assert ranks.told == [None]
    assert "rank 0" in str(ranks.register(ranks.second))


def test_a_tier_that_is_gone(ranks: Ranks) -> None:
    ranks.register(ranks.first)
    ranks.first.close()
    assert ranks.first._worker is not None
    ranks.first._worker.arena.close()
    assert "can't be shared" in str(ranks.register(ranks.second))
