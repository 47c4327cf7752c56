"""The connector's half in the scheduler, with the calls that vLLM's scheduler makes, and no engine."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvbm.config import load_config
from kvbm.logic.hashing import SequenceHasher, root_hash
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.vllm_integration import scheduler as scheduler_module
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


def test_chunked_prefill_and_decode() -> None:
    scheduler, request = Scheduler(), make_request(tokens=10)
    assert scheduler.admit(request, [5, 6]) == 0
    assert scheduler.step({request: 6}, new=(request,)).operations == []
    assert scheduler.stored(scheduler.step({request: 4}, blocks={"r": [9]}), request) == {0: 5}
    decode(request)
    assert scheduler.stored(scheduler.step({request: 1}), request) == {1: 6}
    decode(request)
    assert scheduler.step({request: 1}).operations == []
    decode(request)  # 13 tokens: block 2 is full and computed by now
    assert scheduler.step({request: 1}, blocks={"r": [3]}).operations == []
    steps = [scheduler.step() for _ in range(scheduler_module._STEPS_TOGETHER)]
    assert [scheduler.stored(orders, request) for orders in steps] == [*[{}] * (len(steps) - 1), {2: 9}]


def decoding(scheduler: Scheduler, count: int) -> list[FakeRequest]:
    """Requests whose next token fills a block; what they have computed before is stored."""
    requests = [make_request(f"r{i}", tokens=2 * BLOCK - 1, first=100 * i) for i in range(count)]
    for i, request in enumerate(requests):
        assert scheduler.admit(request, [2 * i, 2 * i + 1]) == 0
    scheduler.step({request: request.num_tokens for request in requests}, new=tuple(requests))
    assert len(scheduler.step().operations) == 1
    for request in requests:
        decode(request)
    return requests


def fill(scheduler: Scheduler, request: FakeRequest, block: int) -> int:
    """A step in which a request goes on to another block; how many blocks its orders store."""
    scheduler.step({request: 1})
    decode(request)
    orders = scheduler.step({request: 1}, blocks={request.request_id: [block]})
    return sum(len(operation.host_slots) for operation in orders.operations)


def test_blocks_that_fill_one_by_one_are_stored_together() -> None:
    scheduler = Scheduler()
    first, second, third = decoding(scheduler, 3)
    assert (fill(scheduler, first, 41), fill(scheduler, second, 42)) == (0, 0)
    counts = [len(scheduler.stored(scheduler.step(), first)) for _ in range(scheduler_module._STEPS_TOGETHER)]
    assert counts.index(1) == scheduler_module._STEPS_TOGETHER - 3  # two steps were over
    assert scheduler.leader.queued[0] == 3 + 2
    # The next ones wait anew. A request that ends waits for none: its blocks are about to be freed.
    assert fill(scheduler, third, 43) == 0
    scheduler.side.finish(third, [[4, 5, 43]])
    (operation,) = scheduler.step().operations
    assert operation.device_blocks.tolist() == [5]


def test_blocks_of_many_requests_do_not_wait() -> None:
    scheduler = Scheduler()
    requests = decoding(scheduler, scheduler_module._STORED_TOGETHER)
    scheduler.step(dict.fromkeys(requests, 1))
    for request in requests:
        decode(request)
    blocks = {request.request_id: [40 + i] for i, request in enumerate(requests)}
    assert scheduler.step(dict.fromkeys(requests, 1), blocks=blocks).operations == []
    (operation,) = scheduler.step().operations
    assert len(operation.host_slots) == len(requests)


def test_blocks_that_wait_go_with_a_prompt() -> None:
    scheduler = Scheduler()
    (request,) = decoding(scheduler, 1)
    assert fill(scheduler, request, 41) == 0
    prompt = make_request("prompt", tokens=2 * BLOCK, first=5000)
    assert scheduler.admit(prompt, [51, 52]) == 0
    assert scheduler.step({prompt: 2 * BLOCK, request: 1}, new=(prompt,)).operations == []
    (operation,) = scheduler.step().operations
    assert sorted(operation.device_blocks.tolist()) == [1, 51, 52]


def test_blocks_in_flight_are_not_matched() -> None:
    scheduler, request = Scheduler(), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 10}, new=(request,)).operations
    assert scheduler.visible(request) == 0
    scheduler.report(operation)
    assert scheduler.visible(request) == 2


def test_all_ranks_must_have_written() -> None:
    scheduler, request = Scheduler(ranks=2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 10}, new=(request,)).operations
    scheduler.report(operation, rank=0)
    assert scheduler.visible(request) == 0
    scheduler.report(operation, rank=0)  # twice the same is not both
    assert scheduler.visible(request) == 0
    scheduler.report(operation, rank=1)
    assert scheduler.visible(request) == 2


def test_a_rank_that_failed_withdraws_the_block() -> None:
    scheduler, request = Scheduler(ranks=2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 10}, new=(request,)).operations
    scheduler.report(operation, rank=1)
    scheduler.report(operation, rank=0, failed=True)
    assert scheduler.visible(request) == 0


def test_nothing_is_stored_while_a_load_is_under_way() -> None:
    """vLLM counts the tokens of a load as computed when it starts."""
    scheduler, first = Scheduler(), make_request("a", tokens=13)
    scheduler.admit(first, [5, 6, 7, 8])
    (operation,) = scheduler.run({first: 13}, new=(first,)).operations
    scheduler.report(operation)
    scheduler.side.finish(first, [[5, 6, 7, 8]])

    second = make_request("b", tokens=21)
    assert scheduler.admit(second, [11, 12, 13, 14, 15, 16]) == 12
    orders = scheduler.step()
    assert [operation.direction for operation in orders.operations] == [Direction.ONBOARD]
    assert orders.operations[0].device_blocks.tolist() == [11, 12, 13]
    second.num_computed_tokens = 20  # as if more had been counted
    scheduler.side.finish(second, [[11, 12, 13, 14, 15, 16]])  # aborted
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
    (operation,) = scheduler.run({request: 10}, new=(request,)).operations
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

    scheduler.side.allocated(request, [[21, 22, 23]], 0)  # the load is over, it is admitted again
    orders = scheduler.step({request: 3}, resumed=(request,), blocks={"r": [21, 22, 23]})
    assert scheduler.stored(orders, request) == {}
    stored: dict[int, int] = {}
    for block in (24, 25, 26):
        for _ in range(BLOCK - 1 if block == 24 else BLOCK):
            decode(request)
            grows = (request.num_computed_tokens + 1) % BLOCK == 1
            orders = scheduler.step({request: 1}, blocks={"r": [block]} if grows else None)
            stored |= scheduler.stored(orders, request)
    scheduler.side.finish(request, [[21, 22, 23, 24, 25, 26]])
    stored |= scheduler.stored(scheduler.step(), request)
    assert stored == {2: 23, 3: 24, 4: 25} or stored == {2: 23, 3: 24}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("same_step", [False, True])
def test_resumed_without_host_hit(v2: bool, same_step: bool) -> None:
    """The offload under way is given up with the device blocks, and is done again from the new ones."""
    scheduler, request = Scheduler(v2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (lost,) = scheduler.run({request: 10}, new=(request,)).operations
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
    scheduler.side.finish(request, [[21, 22, 23, 24]])
    stored |= scheduler.stored(scheduler.step(), request)
    assert {block: device for block, device in stored.items() if block > 2 or device < 20} == {}
    assert stored == {0: 21, 1: 22, 2: 23}


def test_what_was_computed_in_a_step_before_a_preemption_is_not_stored() -> None:
    """Its device blocks are given to others in the step with whose orders it would be."""
    scheduler, request = Scheduler(), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    scheduler.step({request: 10}, new=(request,))
    other = make_request("other", tokens=10, first=5000)
    request.num_computed_tokens = 0
    scheduler.admit(other, [5, 6, 7])
    assert scheduler.step({other: 10}, new=(other,), preempted=(request,)).operations == []
    assert scheduler.stored(scheduler.step(), other) == {0: 5, 1: 6}
    assert scheduler.visible(request) == 0


def test_what_is_being_loaded_is_not_stored() -> None:
    """Of a request that was preempted and is admitted again, in one step."""
    scheduler, request = Scheduler(), make_request(tokens=13)
    scheduler.admit(request, [5, 6, 7, 8])
    (operation,) = scheduler.run({request: 13}, new=(request,)).operations
    scheduler.report(operation)
    decode(request, 4)
    scheduler.step({request: 4}, blocks={"r": [9]})
    other = make_request("other", tokens=13)
    assert scheduler.admit(other, [31, 32, 33, 34]) == 3 * BLOCK
    request.num_computed_tokens = 0
    assert scheduler.admit(request, [11, 12, 13, 14, 15]) == 3 * BLOCK
    # What the host has turns out to be damaged before the step is planned.
    scheduler.leader._planner.drop(scheduler.leader.pool.find(hashes_of(request)[:3]))
    orders = scheduler.step(preempted=(request,))
    assert [operation.direction for operation in orders.operations] == [Direction.ONBOARD] * 2


def hashed(scheduler: Scheduler, request: Any) -> int:
    hasher = scheduler.leader.hasher(request.request_id)
    assert hasher is not None
    return len(hasher)


def test_before_a_step_only_as_much_is_named_as_the_answer_needs() -> None:
    scheduler = Scheduler(slots=2048)
    look = scheduler_module._FIRST_LOOK
    prompt = make_request("a", tokens=12 * look * BLOCK + 1)
    assert scheduler.side.match(prompt, 0) == (0, False)
    assert hashed(scheduler, prompt) == look
    scheduler.side.allocated(prompt, [list(range(12 * look + 1))], 0)
    scheduler.step({prompt: prompt.num_tokens}, new=(prompt,))
    assert hashed(scheduler, prompt) == look  # the model computes these blocks, and takes its time
    operations = scheduler.step().operations
    assert sum(len(each.host_slots) for each in operations) == hashed(scheduler, prompt) == 12 * look
    assert 12 * look > scheduler_module._NAMES_A_STEP
    for operation in operations:
        scheduler.report(operation)

    everything = make_request("b", tokens=prompt.num_tokens)
    assert scheduler.side.match(everything, 0) == (12 * look * BLOCK, True)
    beside = make_request("c", tokens=prompt.num_tokens)
    for block in (look - 1, look, 2 * look, 3 * look + 1):
        part = make_request(f"{block}", tokens=prompt.num_tokens)
        part.all_token_ids[block * BLOCK] = 1
        assert scheduler.side.match(part, 0) == (block * BLOCK, block > 0)
        assert block < hashed(scheduler, part) <= 2 * block + look
    # All on the device but the last token: nothing is asked, nothing named.
    assert scheduler.side.match(beside, 12 * look * BLOCK) == (0, False)
    assert hashed(scheduler, beside) == 0


def test_what_is_found_on_the_device_is_stored_step_by_step() -> None:
    """Steps that compute next to nothing are short: the engine waits for what is done meanwhile."""
    scheduler = Scheduler(slots=2048)
    most = scheduler_module._NAMES_A_STEP
    request = make_request(tokens=3 * most * BLOCK + 1)
    other = make_request("other", tokens=most * BLOCK + 1, first=100_000)
    for each, blocks in ((request, range(3 * most + 1)), (other, range(4000, 4001 + most))):
        assert scheduler.admit(each, list(blocks), device_hit=each.num_tokens - 1) == 0
    scheduler.step({request: 1, other: 1}, new=(request, other))
    named, stored = [], []
    for _ in range(5):
        orders = scheduler.step()
        named.append((hashed(scheduler, request), hashed(scheduler, other)))
        stored.append(sum(len(operation.host_slots) for operation in orders.operations))
    assert named == [(most, 0), (2 * most, 0), (3 * most, 0), (3 * most, most), (3 * most, most)]
    assert stored == [most] * 4 + [0]
    assert scheduler.pinned() == 2 * 4 * most  # of the offloads, and of the requests, each once


def test_what_was_not_stored_yet_is_when_the_request_ends() -> None:
    scheduler = Scheduler(slots=2048)
    most = scheduler_module._NAMES_A_STEP
    request = make_request(tokens=3 * most * BLOCK + 1)
    blocks = [i % 63 + 1 for i in range(3 * most + 1)]
    scheduler.admit(request, blocks, device_hit=request.num_tokens - 1)
    scheduler.step({request: 1}, new=(request,))
    decode(request)
    operations = scheduler.step({request: 1}, blocks={"r": [63]}).operations  # and grows on
    operations += scheduler.step().operations
    scheduler.side.finish(request, [[*blocks, 63]])
    operations += scheduler.step().operations
    assert sum(len(operation.host_slots) for operation in operations) == 3 * most
    assert scheduler.step().operations == []
    for operation in operations:
        scheduler.report(operation)
    assert scheduler.pinned() == 0


def test_finish_holds_the_blocks_that_offloads_read() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    orders = scheduler.step({request: 12}, new=(request,))
    scheduler.side.finish(request, [[5, 6, 7]])
    assert scheduler.pool.in_use() == {5: 1, 6: 1, 7: 1}
    for operation in orders.operations + scheduler.step().operations:
        scheduler.report(operation)
    assert scheduler.pool.in_use() == {}
    assert scheduler.visible(request) == 3


def test_reset_is_possible_while_offloads_read() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    orders = scheduler.run({request: 12}, new=(request,))
    scheduler.side.finish(request, [[5, 6, 7]])
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
    (operation,) = scheduler.run({first: 9}, new=(first,)).operations
    scheduler.report(operation)
    scheduler.side.finish(first, [[5, 6, 7]])
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
    scheduler.side.finish(second, [[]])

    third = make_request("c", tokens=9, first=5000)
    scheduler.admit(third, [11, 12, 13])
    scheduler.run({third: 9}, new=(third,))
    scheduler.side.finish(third, [[11, 12, 13]])
    assert scheduler.pool.in_use() == {11: 1, 12: 1}
    assert scheduler.pool.reset_prefix_cache()


def test_request_that_is_not_cached() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    request.prompt_embeds = object()
    assert scheduler.admit(request, [5, 6, 7]) == 0
    assert scheduler.step({request: 12}, new=(request,)).operations == []
    scheduler.side.finish(request, [[5, 6, 7]])
    assert scheduler.leader.not_cached == {"prompt embeddings": 1}
    assert scheduler.pool.in_use() == {}


def test_prompt_logprobs_are_not_loaded_but_stored() -> None:
    """vLLM 0.30 and older ask the connector even for requests that must be computed whole."""
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 12}, new=(request,)).operations
    scheduler.report(operation)
    whole = make_request("whole", tokens=12)
    whole.skip_reading_prefix_cache = True
    assert scheduler.admit(whole, [8, 9, 10]) == 0


# ---- loads inside a step


def test_a_load_waits_where_no_rank_can_load_in_step() -> None:
    scheduler = Scheduler()
    scheduler.store(make_request("a"))
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, True)


@pytest.mark.parametrize(
    ("can", "offered"),
    [((True, True), True), ((True, False), False), ((False, True), False), ((False, False), False)],
)
def test_in_step_only_where_all_ranks_can(can: tuple[bool, bool], offered: bool) -> None:
    scheduler = Scheduler(ranks=2, in_step=can)
    first, second = make_request("a"), make_request("b")
    scheduler.admit(first, [5, 6, 7])
    for operation in scheduler.run({first: 10}, new=(first,)).operations:
        scheduler.report(operation, rank=0)
        scheduler.report(operation, rank=1)
    scheduler.side.finish(first, [[5, 6, 7]])
    scheduler.step()

    assert scheduler.admit(second, [11, 12, 13]) == 2 * BLOCK
    assert second.waits is not offered
    (load,) = scheduler.step({second: 2} if offered else None, new=(second,)).operations
    assert load.in_step is offered


def test_nothing_is_offered_before_all_ranks_are_ready() -> None:
    scheduler = Scheduler(ranks=2, in_step=(True, True))
    fresh = Leader(
        load_config(environ={}, host__num_blocks=SLOTS),
        namespace=NAMESPACE,
        block_size=BLOCK,
        num_slots=SLOTS,
        ranks=2,
    )
    assert not fresh.loads_in_step
    fresh.receive([scheduler.report_of(0)])
    assert not fresh.loads_in_step
    fresh.receive([scheduler.report_of(1)])
    assert fresh.loads_in_step
    fresh.off_reason = "test"
    assert not fresh.loads_in_step


def test_the_order_of_a_load_in_step() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=14)
    scheduler.store(make_request("a", tokens=14))
    assert scheduler.admit(request, [11, 12, 13, 14]) == 3 * BLOCK
    assert request.waits is False
    orders = scheduler.step({request: 2}, new=(request,))
    (load,) = orders.operations
    assert (load.direction, load.in_step, orders.tokens) == (Direction.ONBOARD, True, 2)
    assert load.device_blocks.tolist() == [11, 12, 13]
    assert load.host_slots.tolist() == scheduler.leader.pool.find(hashes_of(request)).tolist()


def test_load_in_step_behind_blocks_on_the_device() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=14)
    scheduler.store(make_request("a", tokens=14))
    assert scheduler.admit(request, [11, 12, 13, 14], device_hit=BLOCK) == 2 * BLOCK
    assert request.waits is False
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    assert load.device_blocks.tolist() == [12, 13]
    assert load.host_slots.tolist() == scheduler.leader.pool.find(hashes_of(request)).tolist()[1:]


def test_what_a_request_computes_behind_its_load_is_stored() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=18)
    scheduler.store(make_request("a", tokens=9))
    assert scheduler.admit(request, [11, 12, 13, 14, 15]) == 2 * BLOCK
    orders = scheduler.step({request: 10}, new=(request,))
    assert [operation.in_step for operation in orders.operations] == [True]
    assert scheduler.stored(scheduler.step(), request) == {2: 13, 3: 14}


def test_the_second_request_of_a_step_waits_for_its_load() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"), make_request("b", first=5000))
    first, second, third = make_request("c"), make_request("d", first=5000), make_request("e")
    scheduler.admit(first, [11, 12, 13])
    scheduler.admit(second, [21, 22, 23])
    scheduler.admit(third, [31, 32, 33])
    assert [request.waits for request in (first, second, third)] == [False, True, True]
    orders = scheduler.step({first: 2}, new=(first,))
    assert [(load.request_id, load.in_step) for load in orders.operations] == [
        ("c", True),
        ("d", False),
        ("e", False),
    ]


def test_asked_again_without_room_the_request_is_still_offered_a_load_in_step() -> None:
    """vLLM asks in every step until it finds device blocks for the request; only then it is allocated."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    for _ in range(3):
        assert scheduler.side.match(request, 0) == (2 * BLOCK, False)
        assert scheduler.step().operations == []
    assert scheduler.admit(request, [11, 12, 13]) == 2 * BLOCK
    assert request.waits is False


def test_the_offer_follows_the_state_of_the_engine() -> None:
    """An offer that vLLM did not take binds nobody: what counts is the last answer."""
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    request, other = make_request("b"), make_request("c", first=5000)
    assert scheduler.side.match(request, 0) == (2 * BLOCK, False)
    scheduler.admit(other, [31, 32, 33])
    scheduler.step({other: 10}, new=(other,))
    assert scheduler.admit(request, [11, 12, 13]) == 2 * BLOCK
    assert request.waits is True
    loads = [load for load in scheduler.step({other: 1}).operations if load.request_id]
    assert [load.in_step for load in loads] == [False]


def test_a_pipeline_is_busy_with_requests_that_the_last_step_has_not() -> None:
    """vLLM plans empty steps while a request is in both stages."""
    scheduler = Scheduler(in_step=(True,), steps_in_flight=2)
    scheduler.store(make_request("a"))
    runs, request = make_request("runs", first=5000), make_request("b")
    scheduler.admit(runs, [31, 32, 33])
    scheduler.step({runs: 10}, new=(runs,))
    scheduler.step()
    assert scheduler.side.match(request, 0) == (2 * BLOCK, True)
    scheduler.step()
    assert scheduler.side.match(request, 0) == (2 * BLOCK, False)
    scheduler.step({runs: 1})
    scheduler.side.finish(runs, [[31, 32, 33]])
    assert scheduler.side.match(request, 0) == (2 * BLOCK, False)


def test_a_load_waits_while_another_request_runs() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    runs = make_request("runs", first=5000)
    scheduler.admit(runs, [31, 32, 33])
    scheduler.step({runs: 10}, new=(runs,))
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, True)
    decode(runs)
    scheduler.step({runs: 1})
    assert scheduler.side.match(make_request("c"), 0) == (2 * BLOCK, True)
    scheduler.side.finish(runs, [[31, 32, 33]])
    assert scheduler.side.match(make_request("d"), 0) == (2 * BLOCK, False)


def test_a_request_that_is_not_cached_keeps_the_engine_busy_too() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    stranger = make_request("stranger", first=5000)
    stranger.prompt_embeds = object()
    scheduler.admit(stranger, [31, 32, 33])
    scheduler.step({stranger: 10}, new=(stranger,))
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, True)
    scheduler.side.finish(stranger, [[31, 32, 33]])
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, False)


def test_a_load_waits_while_another_request_waits_for_its_load() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    runs, waits = make_request("runs", first=5000), make_request("waits")
    scheduler.admit(runs, [31, 32, 33])
    scheduler.step({runs: 10}, new=(runs,))
    scheduler.admit(waits, [11, 12, 13])
    assert waits.waits is True
    loads = [load for load in scheduler.step({runs: 1}).operations if load.direction == Direction.ONBOARD]
    scheduler.side.finish(runs, [[31, 32, 33]])
    scheduler.step()
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, True)
    scheduler.report(loads[0])
    assert scheduler.side.match(make_request("c"), 0) == (2 * BLOCK, False)


def test_idle_again_after_a_preemption() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    runs = make_request("runs")
    scheduler.admit(runs, [11, 12, 13])
    assert runs.waits is False
    (load,) = scheduler.step({runs: 2}, new=(runs,)).operations
    scheduler.report(load)
    runs.num_computed_tokens = 0
    scheduler.step(preempted=(runs,))
    assert scheduler.admit(runs, [21, 22, 23]) == 2 * BLOCK
    assert runs.waits is False
    (load,) = scheduler.step({runs: 2}, resumed=(runs,), blocks={"runs": [21, 22, 23]}).operations
    assert (load.in_step, load.device_blocks.tolist()) == (True, [21, 22])


@pytest.mark.parametrize(
    ("tokens", "stored", "offered"),
    [
        (3 * BLOCK, 3, 2),  # whole blocks, all of them in the host tier
        (3 * BLOCK, 2, 2),
        (3 * BLOCK + 1, 3, 3),
        (3 * BLOCK - 1, 2, 2),
        (BLOCK, 1, 0),
        (BLOCK - 1, 0, 0),
    ],
)
def test_a_step_has_a_token_left_to_compute(tokens: int, stored: int, offered: int) -> None:
    """The last token has to be computed for its logits, whether the request waits for its load or not."""
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a", tokens=max(stored * BLOCK, 1)))
    assert scheduler.side.match(make_request("idle", tokens=tokens), 0) == (offered * BLOCK, False)
    runs = make_request("runs", first=5000)
    scheduler.admit(runs, [31, 32, 33])
    scheduler.step({runs: 10}, new=(runs,))
    busy = scheduler.side.match(make_request("busy", tokens=tokens), 0)
    assert busy == (offered * BLOCK, offered > 0)


def test_a_token_is_left_to_compute_behind_blocks_on_the_device() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a", tokens=3 * BLOCK))
    assert scheduler.side.match(make_request("b", tokens=3 * BLOCK), BLOCK) == (BLOCK, False)
    assert scheduler.side.match(make_request("c", tokens=3 * BLOCK), 2 * BLOCK) == (0, False)
    assert scheduler.side.match(make_request("d", tokens=3 * BLOCK), 3 * BLOCK) == (0, False)


def test_a_request_that_is_offered_nothing_is_computed() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=BLOCK)
    scheduler.store(make_request("a", tokens=BLOCK))
    assert scheduler.admit(request, [11]) == 0
    orders = scheduler.step({request: BLOCK}, new=(request,))
    orders.operations += scheduler.step().operations
    assert orders.operations == []  # nothing to load, and the host has what it computes
    assert scheduler.pinned() == 1
    scheduler.side.finish(request, [[11]])
    assert scheduler.pinned() == 0


def test_the_completion_of_a_load_in_step_releases_its_pins() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    assert scheduler.pinned() == 0
    scheduler.admit(request, [11, 12, 13])
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    assert scheduler.pinned() == 2  # of the load
    assert scheduler.step().operations == []
    assert scheduler.pinned() == 2 + 2  # and of the request that uses the blocks
    assert scheduler.leader.stats.onboarded_blocks == 0
    scheduler.report(load)
    assert scheduler.pinned() == 2
    assert scheduler.leader.stats.onboarded_blocks == 2
    scheduler.side.finish(request, [[11, 12, 13]])
    assert (scheduler.pinned(), scheduler.pool.in_use(), scheduler.side.has_work) == (0, {}, False)


@pytest.mark.parametrize("tokens_out", [0, 1])
def test_request_ends_while_its_load_in_step_is_under_way(tokens_out: int) -> None:
    """On a GPU the step is over for the scheduler when the copy is, but its report comes a step later.

    tokens_out: 0 is an abort.
    """
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    scheduler.admit(request, [11, 12, 13])
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    if tokens_out:
        decode(request, tokens_out)
    scheduler.side.finish(request, [[11, 12, 13]])
    # The engine may give the device blocks to others: what these do is ordered behind the load.
    assert scheduler.pool.in_use() == {}
    assert scheduler.pinned() > 0  # the copy reads the host blocks
    assert scheduler.side.has_work
    # and is idle: the next request does not wait
    assert scheduler.side.match(make_request("c"), 0) == (2 * BLOCK, False)
    scheduler.report(load)
    assert (scheduler.pinned(), scheduler.side.has_work) == (0, False)
    assert scheduler.visible(request) == 2


def test_request_aborted_before_its_load_in_step_was_ordered() -> None:
    """The load goes out all the same, with the next step, and is accounted for."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    scheduler.admit(request, [11, 12, 13])
    request.num_computed_tokens = 0
    scheduler.side.finish(request, [[11, 12, 13]])
    for load in scheduler.step().operations:
        scheduler.report(load)
    assert (scheduler.pinned(), scheduler.pool.in_use(), scheduler.side.has_work) == (0, {}, False)


def test_a_load_in_step_that_can_not_be_planned_is_ordered_to_fail_in_step() -> None:
    """The request is in the step already: vLLM waits for no load of it."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    assert scheduler.side.match(request, 0) == (2 * BLOCK, False)
    scheduler.leader.off_reason = "test"
    scheduler.side.allocated(request, [[11, 12, 13]], 2 * BLOCK)
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    assert (load.in_step, load.device_blocks.tolist(), load.host_slots.tolist()) == (True, [11, 12], [-1, -1])


def test_all_ranks_must_have_loaded_in_step() -> None:
    scheduler = Scheduler(ranks=2, in_step=(True, True))
    first, second = make_request("a"), make_request("b")
    scheduler.admit(first, [5, 6, 7])
    for operation in scheduler.run({first: 10}, new=(first,)).operations:
        scheduler.report(operation, rank=0)
        scheduler.report(operation, rank=1)
    scheduler.side.finish(first, [[5, 6, 7]])
    scheduler.step()
    scheduler.admit(second, [11, 12, 13])
    (load,) = scheduler.step({second: 2}, new=(second,)).operations
    scheduler.side.finish(second, [[11, 12, 13]])
    scheduler.report(load, rank=1)
    assert scheduler.pinned() > 0
    scheduler.report(load, rank=0)
    assert scheduler.pinned() == 0


def test_a_request_whose_load_in_step_failed_is_left_alone() -> None:
    """The next step was planned on top of it: what comes of the request is not to be trusted."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    scheduler.admit(request, [11, 12, 13])
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    scheduler.report(load, failed=True)
    assert scheduler.visible(request) == 0
    request.num_computed_tokens = 0  # vLLM computes it again, in the same device blocks
    assert scheduler.side.match(request, 0) == (0, False)
    scheduler.step({request: 10})
    scheduler.side.finish(request, [[11, 12, 13]])
    orders = scheduler.step()
    assert scheduler.stored(orders, request) == {}
    assert (scheduler.pinned(), scheduler.visible(request), scheduler.pool.in_use()) == (0, 0, {})


def test_blocks_computed_from_a_failed_load_in_step_do_not_become_visible() -> None:
    """They were computed in the same step from what was not there."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=18)
    scheduler.store(make_request("a", tokens=9))
    scheduler.admit(request, [11, 12, 13, 14, 15])
    (load,) = scheduler.step({request: 10}, new=(request,)).operations
    (offload,) = scheduler.step().operations  # planned before the load is reported
    assert (load.in_step, offload.device_blocks.tolist()) == (True, [13, 14])
    scheduler.report(load, failed=True)
    # vLLM computes the request again from the first block that failed, in the same device blocks.
    request.num_computed_tokens = 0
    scheduler.report(offload)
    own = scheduler.leader.pool.find(hashes_of(request))
    assert (own[2:4] < 0).all(), "the wrong bytes have the name of the right ones"
