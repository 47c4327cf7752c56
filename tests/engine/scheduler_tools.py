"""What plays vLLM's scheduler, its requests and its block pool, for the connector's half there."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvbm.config import load_config
from kvbm.logic.hashing import SequenceHasher, root_hash
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.vllm_integration.scheduler import SchedulerSide

BLOCK = 4
SLOTS = 64
NAMESPACE = b"test namespace.."


class FakeBlockPool:
    """vLLM's block pool, as far as the connector uses it."""

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_id=i, ref_cnt=0, is_null=i == 0) for i in range(64)]
        self.resets = 0

    def touch(self, blocks: list[Any]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: list[Any]) -> None:
        for block in blocks:
            assert block.ref_cnt > 0
            block.ref_cnt -= 1

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return not self.in_use()

    def in_use(self) -> dict[int, int]:
        return {block.block_id: block.ref_cnt for block in self.blocks if block.ref_cnt}


class Scheduler:
    """Plays vLLM's scheduler for one request after the other. v2: as with Model Runner V2.

    in_step: of each rank, whether its worker can load inside a step.
    """

    def __init__(
        self,
        v2: bool = False,
        ranks: int = 1,
        in_step: Sequence[bool] = (),
        slots: int = SLOTS,
        steps_in_flight: int = 1,
    ) -> None:
        config = load_config(environ={}, host__num_blocks=slots)
        self.slots = slots
        self.leader = Leader(config, namespace=NAMESPACE, block_size=BLOCK, num_slots=slots, ranks=ranks)
        self.side = SchedulerSide(self.leader, BLOCK, steps_in_flight=steps_in_flight)
        self.pool = FakeBlockPool()
        self.side.bind_block_pool(self.pool)
        self.v2 = v2
        self.in_step = list(in_step) or [False] * ranks
        for rank in range(ranks):
            self.side.update((), [self.report_of(rank)])

    def report_of(self, rank: int, completions: Sequence[Completion] = ()) -> WorkerReport:
        return WorkerReport(
            rank, self.slots, self.slots, loads_in_step=self.in_step[rank], completions=list(completions)
        )

    def admit(self, request: Any, blocks: list[int], device_hit: int = 0) -> int:
        """From the waiting queue; returns the tokens to load. `request.waits`: whether it waits for them."""
        external, request.waits = self.side.match(request, device_hit)
        assert external is not None
        self.side.allocated(request, [blocks], external)
        request.num_computed_tokens = device_hit + external
        return external

    def step(
        self,
        scheduled: dict[Any, int] | None = None,
        *,
        new: tuple[Any, ...] = (),
        resumed: tuple[Any, ...] = (),
        blocks: dict[str, list[int]] | None = None,
        preempted: tuple[Any, ...] = (),
    ) -> StepOrders:
        """`blocks`: those that a running request got, or a resumed one has."""
        scheduled = scheduled or {}
        blocks = blocks or {}
        names = {request.request_id: count for request, count in scheduled.items()}
        as_new = [request.request_id for request in (*new, *(resumed if self.v2 else ()))]
        cached = [name for name in names if name not in as_new]
        orders = self.side.build_orders(
            SimpleNamespace(
                scheduled_new_reqs=[
                    SimpleNamespace(req_id=name, block_ids=(blocks.get(name),)) for name in as_new
                ],
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=cached,
                    resumed_req_ids=set() if self.v2 else {request.request_id for request in resumed},
                    new_block_ids=[(blocks[name],) if name in blocks else None for name in cached],
                ),
                num_scheduled_tokens=names,
                total_num_scheduled_tokens=sum(names.values()),
                preempted_req_ids={request.request_id for request in preempted},
            )
        )
        for request, count in scheduled.items():
            request.num_computed_tokens += count
        return orders

    def run(self, scheduled: dict[Any, int], *, new: tuple[Any, ...]) -> StepOrders:
        """A step, and the next, which computes nothing: what the first has computed goes with it."""
        assert self.step(scheduled, new=new).operations == []
        return self.step()

    def report(
        self, operation: Operation, failed: bool = False, rank: int = 0, quiesced: bool = True
    ) -> None:
        positions = np.arange(len(operation.host_slots) if failed else 0, dtype=np.int32)
        reason = Failure.CANCELLED if failed else Failure.NONE
        if not quiesced:
            reason = Failure.TIMEOUT
        completion = Completion(operation.id, positions, reason, quiesced=quiesced)
        waited_for = operation.direction == Direction.ONBOARD and not operation.in_step
        done = {operation.request_id} if waited_for else set()
        self.side.update(done, [self.report_of(rank, [completion])])

    def store(self, *requests: "FakeRequest") -> None:
        """Fill the host tier with the full blocks of the requests, one after the other."""
        for request in requests:
            blocks = list(range(40, 40 + -(-request.num_tokens // BLOCK)))
            assert self.admit(request, blocks) == 0
            self.step({request: request.num_tokens}, new=(request,))
            self.side.finish(request, [blocks])
            for operation in self.step().operations:
                self.report(operation)

    def pinned(self) -> int:
        return int(self.leader.pool.pins(np.arange(self.slots)).sum())

    def stored(self, orders: StepOrders, request: Any) -> dict[int, int]:
        """Device block by block of the request, for what is offloaded."""
        slots = self.leader.pool.find(hashes_of(request))
        block_of = {int(slot): index for index, slot in enumerate(slots) if slot >= 0}
        return {
            block_of[slot]: block
            for operation in orders.operations
            if operation.direction == Direction.OFFLOAD
            for slot, block in zip(
                operation.host_slots.tolist(), operation.device_blocks.tolist(), strict=True
            )
            if slot in block_of
        }

    def visible(self, request: Any) -> int:
        return len(self.leader.pool.match(hashes_of(request)))


class FakeRequest(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def make_request(name: str = "r", tokens: int = 10, first: int = 1000) -> FakeRequest:
    return FakeRequest(
        request_id=name,
        all_token_ids=list(range(first, first + tokens)),
        num_computed_tokens=0,
        pooling_params=None,
        prompt_embeds=None,
        mm_features=[],
        lora_request=None,
        cache_salt=None,
        skip_reading_prefix_cache=False,
        waits=None,
    )


def hashes_of(request: Any) -> Any:
    hasher = SequenceHasher(root_hash(NAMESPACE, BLOCK), BLOCK)
    hasher.extend(request.all_token_ids)
    return hasher.hashes


def decode(request: FakeRequest, tokens: int = 1) -> None:
    request.all_token_ids += [7000 + len(request.all_token_ids) + i for i in range(tokens)]
