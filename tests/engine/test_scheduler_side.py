"""The connector's half in the scheduler, with the calls that vLLM's scheduler makes, and no engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

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
    """Plays vLLM's scheduler for one request after the other. v2: as with Model Runner V2."""

    def __init__(self, v2: bool = False, ranks: int = 1) -> None:
        config = load_config(environ={}, host__num_blocks=SLOTS)
        self.leader = Leader(config, namespace=NAMESPACE, block_size=BLOCK, num_slots=SLOTS, ranks=ranks)
        self.side = SchedulerSide(self.leader, BLOCK)
        self.pool = FakeBlockPool()
        self.side.bind_block_pool(self.pool)
        self.v2 = v2
        for rank in range(ranks):
            self.side.update((), [WorkerReport(rank, SLOTS)])

    def admit(self, request: Any, blocks: list[int], device_hit: int = 0) -> int:
        """From the waiting queue; returns the tokens to load, for which it waits then."""
        external = self.side.match(request, device_hit)
        self.side.allocated(request, blocks, external)
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
        as_new = {request.request_id for request in (*new, *(resumed if self.v2 else ()))}
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

    def report(
        self, operation: Operation, failed: bool = False, rank: int = 0, quiesced: bool = True
    ) -> None:
        positions = np.arange(len(operation.host_slots) if failed else 0, dtype=np.int32)
        reason = Failure.CANCELLED if failed else Failure.NONE
        if not quiesced:
            reason = Failure.TIMEOUT
        completion = Completion(operation.id, positions, reason, quiesced)
        done = {operation.request_id} if operation.direction == Direction.ONBOARD else set()
        self.side.update(done, [WorkerReport(rank, SLOTS, completions=[completion])])

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
    )


def hashes_of(request: Any) -> Any:
    hasher = SequenceHasher(root_hash(NAMESPACE, BLOCK), BLOCK)
    hasher.extend(request.all_token_ids)
    return hasher.hashes


def decode(request: FakeRequest, tokens: int = 1) -> None:
    request.all_token_ids += [7000 + len(request.all_token_ids) + i for i in range(tokens)]


def test_chunked_prefill_and_decode() -> None:
    scheduler, request = Scheduler(), make_request(tokens=10)
    assert scheduler.admit(request, [5, 6]) == 0
    assert scheduler.stored(scheduler.step({request: 6}, new=(request,)), request) == {0: 5}
    assert scheduler.stored(scheduler.step({request: 4}, blocks={"r": [9]}), request) == {1: 6}
    decode(request)
    assert scheduler.stored(scheduler.step({request: 1}), request) == {}
    decode(request)
    scheduler.step({request: 1})
    decode(request)  # 13 tokens: block 2 is full and computed in the last step
    assert scheduler.stored(scheduler.step({request: 1}, blocks={"r": [3]}), request) == {2: 9}


def test_blocks_in_flight_are_not_matched() -> None:
    scheduler, request = Scheduler(), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.step({request: 10}, new=(request,)).operations
    assert scheduler.visible(request) == 0
    scheduler.report(operation)
    assert scheduler.visible(request) == 2


def test_all_ranks_must_have_written() -> None:
    scheduler, request = Scheduler(ranks=2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.step({request: 10}, new=(request,)).operations
    scheduler.report(operation, rank=0)
    assert scheduler.visible(request) == 0
    scheduler.report(operation, rank=0)  # twice the same is not both
    assert scheduler.visible(request) == 0
    scheduler.report(operation, rank=1)
    assert scheduler.visible(request) == 2


def test_a_rank_that_failed_withdraws_the_block() -> None:
    scheduler, request = Scheduler(ranks=2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.step({request: 10}, new=(request,)).operations
    scheduler.report(operation, rank=1)
    scheduler.report(operation, rank=0, failed=True)
    assert scheduler.visible(request) == 0


def test_nothing_is_stored_while_a_load_is_under_way() -> None:
    """vLLM counts the tokens of a load as computed when it starts."""
    scheduler, first = Scheduler(), make_request("a", tokens=13)
    scheduler.admit(first, [5, 6, 7, 8])
    (operation,) = scheduler.step({first: 13}, new=(first,)).operations
    scheduler.report(operation)
    scheduler.side.finish(first, [5, 6, 7, 8])

    second = make_request("b", tokens=21)
    assert scheduler.admit(second, [11, 12, 13, 14, 15, 16]) == 12
    orders = scheduler.step()
    assert [operation.direction for operation in orders.operations] == [Direction.ONBOARD]
    assert orders.operations[0].device_blocks.tolist() == [11, 12, 13]
    second.num_computed_tokens = 20  # as if more had been counted
    scheduler.side.finish(second, [11, 12, 13, 14, 15, 16])  # aborted
    assert scheduler.step().operations == []
    scheduler.report(orders.operations[0])
    assert scheduler.pool.in_use() == {}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("same_step", [False, True])
def test_resumed_after_preemption(v2: bool, same_step: bool) -> None:
    """After its resumption every block is stored from the device block that now has it.

    same_step: as with reset_prefix_cache(reset_running_requests=True), which reports the preemption with
    the step that resumes the request.
    """
    scheduler, request = Scheduler(v2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.step({request: 10}, new=(request,)).operations
    scheduler.report(operation)
    decode(request)

    request.num_computed_tokens = 0
    if not same_step:
        scheduler.step(preempted=(request,))
    external = scheduler.admit(request, [21, 22, 23])
    assert external == 2 * BLOCK
    loads = scheduler.step(preempted=(request,) if same_step else ()).operations
    assert [load.device_blocks.tolist() for load in loads] == [[21, 22]]
    scheduler.report(loads[0])

    scheduler.side.allocated(request, [21, 22, 23], 0)  # the load is over, it is admitted again
    orders = scheduler.step({request: 3}, resumed=(request,), blocks={"r": [21, 22, 23]})
    assert scheduler.stored(orders, request) == {}
    stored: dict[int, int] = {}
    for block in (24, 25, 26):
        for _ in range(BLOCK - 1 if block == 24 else BLOCK):
            decode(request)
            grows = (request.num_computed_tokens + 1) % BLOCK == 1
            orders = scheduler.step({request: 1}, blocks={"r": [block]} if grows else None)
            stored |= scheduler.stored(orders, request)
    scheduler.side.finish(request, [21, 22, 23, 24, 25, 26])
    stored |= scheduler.stored(scheduler.step(), request)
    assert stored == {2: 23, 3: 24, 4: 25} or stored == {2: 23, 3: 24}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("same_step", [False, True])
def test_resumed_without_host_hit(v2: bool, same_step: bool) -> None:
    """The offload under way is given up with the device blocks, and is done again from the new ones."""
    scheduler, request = Scheduler(v2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (lost,) = scheduler.step({request: 10}, new=(request,)).operations
    decode(request)

    request.num_computed_tokens = 0
    orders = None if same_step else scheduler.step(preempted=(request,))
    assert scheduler.admit(request, [21, 22, 23]) == 0
    resumed = scheduler.step(
        {request: 11},
        resumed=(request,),
        blocks={"r": [21, 22, 23]},
        preempted=(request,) if same_step else (),
    )
    cancelled = (orders or resumed).cancel
    assert cancelled == [lost.id]
    stored = scheduler.stored(resumed, request)
    for operation in resumed.operations:
        scheduler.report(operation)
    scheduler.report(lost, failed=True)
    for _ in range(2):
        decode(request)
        grows = request.num_computed_tokens % BLOCK == 0
        orders = scheduler.step({request: 1}, blocks={"r": [24]} if grows else None)
        stored |= scheduler.stored(orders, request)
    scheduler.side.finish(request, [21, 22, 23, 24])
    stored |= scheduler.stored(scheduler.step(), request)
    assert {block: device for block, device in stored.items() if block > 2 or device < 20} == {}
    assert stored == {0: 21, 1: 22, 2: 23}


def test_finish_holds_the_blocks_that_offloads_read() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    orders = scheduler.step({request: 12}, new=(request,))
    scheduler.side.finish(request, [5, 6, 7])
    assert scheduler.pool.in_use() == {5: 1, 6: 1, 7: 1}
    for operation in orders.operations + scheduler.step().operations:
        scheduler.report(operation)
    assert scheduler.pool.in_use() == {}
    assert scheduler.visible(request) == 3


def test_reset_is_possible_while_offloads_read() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    orders = scheduler.step({request: 12}, new=(request,))
    scheduler.side.finish(request, [5, 6, 7])
    assert scheduler.pool.reset_prefix_cache()
    assert scheduler.step().cancel == [operation.id for operation in orders.operations]
    for operation in orders.operations:
        scheduler.report(operation)  # too late
    assert scheduler.visible(request) == 0
    assert scheduler.pool.in_use() == {}


def test_reset_is_possible_after_a_load_timed_out_on_the_same_blocks() -> None:
    """What a stuck load holds, and gives back, is not taken for what offloads hold."""
    scheduler, first = Scheduler(), make_request("a", tokens=9)
    scheduler.admit(first, [5, 6, 7])
    (operation,) = scheduler.step({first: 9}, new=(first,)).operations
    scheduler.report(operation)
    scheduler.side.finish(first, [5, 6, 7])
    for operation in scheduler.step().operations:
        scheduler.report(operation)

    second = make_request("b", tokens=9)
    assert scheduler.admit(second, [11, 12, 13]) == 8
    (load,) = scheduler.step().operations
    scheduler.report(load, failed=True, quiesced=False)
    assert scheduler.pool.in_use() == {11: 1, 12: 1}
    scheduler.report(load, failed=True)
    assert scheduler.pool.in_use() == {}
    second.num_computed_tokens = 0
    scheduler.side.finish(second, [])

    third = make_request("c", tokens=9, first=5000)
    scheduler.admit(third, [11, 12, 13])
    scheduler.step({third: 9}, new=(third,))
    scheduler.side.finish(third, [11, 12, 13])
    assert scheduler.pool.in_use() == {11: 1, 12: 1}
    assert scheduler.pool.reset_prefix_cache()


def test_request_that_is_not_cached() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    request.prompt_embeds = object()
    assert scheduler.admit(request, [5, 6, 7]) == 0
    assert scheduler.step({request: 12}, new=(request,)).operations == []
    scheduler.side.finish(request, [5, 6, 7])
    assert scheduler.leader.not_cached == {"prompt embeddings": 1}
    assert scheduler.pool.in_use() == {}


def test_prompt_logprobs_are_not_loaded_but_stored() -> None:
    """vLLM 0.30 and older ask the connector even for requests that must be computed whole."""
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.step({request: 12}, new=(request,)).operations
    scheduler.report(operation)
    whole = make_request("whole", tokens=12)
    whole.skip_reading_prefix_cache = True
    assert scheduler.admit(whole, [8, 9, 10]) == 0
