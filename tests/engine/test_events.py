"""KV events as a router receives them over ZMQ from a real engine, in vLLM's own types."""

import contextlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from tests.engine import disk_tools as disk
from tests.engine import events_tools as tools
from tests.engine import scenarios
from tests.engine.disk_tools import settings
from tests.engine.events_tools import Held, Subscriber, rebuild, stored_blocks
from tests.engine.harness import BLOCK_SIZE, Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

HOST, DISK = 24, 40
_OPTIONS: dict[str, Any] = {"max_model_len": 640, "num_gpu_blocks_override": 40, "max_num_seqs": 8}


class Routed:
    """An engine, its router, and all sequences that were asked for."""

    def __init__(self, model: Path, folder: Path, mode: str) -> None:
        self.mode = mode
        self.router = Subscriber()
        self.sequences: list[tools.Sequence_] = []
        env = settings(folder, host=HOST, disk=DISK, more={"DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE": mode})
        self.engine = Engine(model, kvbm={}, env=env, **_OPTIONS, **self.router.options)
        self.engine.call(disk.wait_ready)

    def run(self, asks: list[Ask], again: bool = False) -> disk.DiskRan:
        ran = self.engine.call(disk.run_again if again else disk.run, asks)
        self.sequences += [
            (ask.prompt + tuple(reply), ask.salt) for ask, reply in zip(asks, ran.tokens, strict=True)
        ]
        return ran

    def check(self) -> Held:
        """The router knows what is held, no more and no less. Returns what that is."""
        self.router.sync(self.engine)
        truth = self.engine.call(tools.held, self.sequences)
        known = rebuild(self.router.events())
        if self.mode == "passthrough":
            assert known == truth
        else:
            assert set().union(*known.values()) == set().union(*truth.values())
            assert sum(map(len, known.values())) == len(set().union(*known.values()))
        counts = self.engine.call(tools.counts)
        assert not counts["failed"]
        # The truth leaves out no block, and nothing is remembered but what is held or may be.
        assert (counts["host blocks"], counts["disk blocks"]) == (len(truth["CPU"]), len(truth["STORAGE"]))
        assert counts["remembered"] - counts["expected"] == len(truth["CPU"] | truth["STORAGE"])
        return truth

    def close(self) -> None:
        self.engine.close()
        self.router.close()


@pytest.fixture(scope="module", params=["dedup", "passthrough"])
def routed(
    request: pytest.FixtureRequest, keen: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Routed]:
    routed = Routed(keen, tmp_path_factory.mktemp("disk"), request.param)
    yield routed
    routed.close()


def test_router_knows_what_is_held(routed: Routed, prompts: Prompts) -> None:
    """Prompts that fit in no tier; each comes again, from wherever it is."""
    pool = [
        Ask(prompt, 40) for prompt in prompts.batch(800, [100, 170, 250, 64, 320, 130, 210, 90, 280, 150])
    ]
    served = 0
    for round_ in range(2):
        for at in range(0, len(pool), 3):
            served += routed.run(pool[at : at + 3]).external_hits
            truth = routed.check()
            assert truth["GPU"]
            assert truth["CPU"]
            assert truth["STORAGE"]
        served += routed.run(pool[round_ : round_ + 2], again=True).external_hits
        routed.check()
    assert served > 0
    counts = routed.engine.call(tools.counts)
    assert counts["host evictions"] > 0
    assert counts["disk evictions"] > 0
    assert routed.run([pool[0], pool[0], pool[0]]).tokens  # several copies of a block on the device
    truth = routed.check()
    assert truth["CPU"] - truth["GPU"] or truth["STORAGE"] - truth["GPU"]


def test_tiers_say_of_a_block_what_the_device_says(routed: Routed, prompts: Prompts) -> None:
    """Parent, tokens, extra keys and group: a router computes its own hashes from them."""
    prompt = prompts.make(820, 140)
    routed.run([Ask(prompt), Ask(prompt, salt="A"), Ask(prompt, salt="B")])
    routed.check()
    said = stored_blocks(routed.router.events())
    ours = {name: (medium, facts) for (medium, name), facts in said.items() if medium != "GPU"}
    both = [name for name in ours if ("GPU", name) in said]
    if routed.mode == "passthrough":
        assert len(both) > 50
    assert {name: ours[name][1] for name in both} == {name: said["GPU", name] for name in both}


def test_salts_do_not_share(routed: Routed, prompts: Prompts) -> None:
    prompt = prompts.make(830, 100)
    before = len(routed.router.received)
    for salt in (None, "A", "B"):
        routed.run([Ask(prompt, 1, salt)])
    truth = routed.check()
    own = [routed.engine.call(tools.names, [(prompt, salt)]) for salt in (None, "A", "B")]
    names = [set(found.values()) for found in own]
    assert len(set().union(*names)) == 9
    assert set().union(*names) <= truth["CPU"]
    new = [event for batch in routed.router.batches()[before:] for event in batch.events]
    salts = {
        name: extra
        for (_, name), (parent, _, extra, _) in stored_blocks(new).items()
        if parent is None and any(name in group for group in names)
    }
    assert sorted(salts.values(), key=str) == sorted([None, ("A",), ("B",)], key=str)


def test_device_reset_keeps_what_can_be_loaded(routed: Routed, prompts: Prompts) -> None:
    routed.run([Ask(prompts.make(840, 200))])
    before = len(routed.router.received)
    assert routed.engine.call(scenarios.reset)
    routed.engine.call(scenarios.drain)  # an idle engine makes the step that publishes it
    truth = routed.check()
    assert truth["GPU"] == set()
    assert truth["CPU"]
    new = [type(event).__name__ for batch in routed.router.batches()[before:] for event in batch.events]
    assert "AllBlocksCleared" not in new  # it would mean all that KVBM holds, to some
    routed.run([Ask(prompts.make(840, 200))])
    routed.check()


def test_nothing_is_left_after_a_reset_with_connector(routed: Routed, prompts: Prompts) -> None:
    ask = Ask(prompts.make(850, 200))
    routed.run([ask])
    assert routed.engine.call(scenarios.reset, False, True)
    routed.engine.call(scenarios.drain)
    assert set().union(*routed.check().values()) == set()
    assert type(routed.router.events()[-1]).__name__ == "AllBlocksCleared"
    routed.run([ask])
    assert len(routed.check()["CPU"]) >= 6


def test_aborts_and_resets(routed: Routed, prompts: Prompts) -> None:
    asks = [Ask(prompt, 20) for prompt in prompts.batch(860, [105, 150, 60, 200, 90, 170])]
    got = routed.engine.call(scenarios.run_with_resets, asks, [2, 7], False)
    routed.sequences += [
        (ask.prompt + tuple(reply), None) for ask, reply in zip(asks, got["tokens"], strict=True)
    ]
    routed.check()
    answers = routed.run(asks).tokens
    assert answers == got["tokens"]
    got = routed.engine.call(scenarios.run_with_aborts, asks * 3, 3)
    assert got["aborted"]
    routed.check()


def test_numbers_and_replay(routed: Routed) -> None:
    routed.router.sync(routed.engine)
    received = list(routed.router.received)
    assert [number for number, _ in received] == list(range(len(received)))
    assert routed.router.replay(0) == received
    assert routed.router.replay(len(received) - 3) == received[-3:]
    assert {batch.data_parallel_rank for batch in routed.router.batches()} == {0}


def test_blocks_of_an_earlier_run(keen: Path, tmp_path: Path, prompts: Prompts) -> None:
    """They are announced when a request names them."""
    asks = [Ask(prompts.make(870, 150), 4), Ask(prompts.make(871, 150), 4)]
    first = Routed(keen, tmp_path, "passthrough")
    try:
        first.engine.call(disk.store, asks)
    finally:
        first.close()
    second = Routed(keen, tmp_path, "passthrough")
    try:
        assert second.engine.call(disk.seen).recovered >= 8
        assert second.engine.call(tools.last_published) == -1
        assert second.run(asks[:1]).external_hits == 4 * BLOCK_SIZE
        second.router.sync(second.engine)
        truth = second.engine.call(tools.held, second.sequences)
        assert rebuild(second.router.events()) == truth
        assert len(truth["STORAGE"]) == 4
    finally:
        second.close()


# ---- without events


def test_an_engine_without_events_pays_nothing(keen: Path, tmp_path: Path, prompts: Prompts) -> None:
    options = {**_OPTIONS, "kv_events_config": None}
    with Engine(keen, kvbm={}, env=settings(tmp_path, host=HOST, disk=DISK), **options) as engine:
        engine.call(scenarios.run, [Ask(prompts.make(880, 100), 2)])
        got = engine.call(tools.hooks)
    assert (got["merging"], got["hooked"]) == (False, False)
    assert not any("KvEvents" in name or "guarded" in name for name in got["subscribers"])


# ---- without an engine


def make_request(**changes: Any) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    hasher = get_request_block_hasher(changes.pop("hash_size", 4), hash_fn)
    tokens = list(range(1000, 1018))
    return Request("r", tokens, SamplingParams(max_tokens=4), None, block_hasher=hasher, **changes)


def image(offset: int, length: int) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    return MultiModalFeatureSpec(
        None, "image", f"image-{offset}", PlaceholderRange(offset=offset, length=length)
    )


def lora() -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name="adapter", lora_int_id=7, lora_path="/adapter")


@pytest.mark.parametrize("hash_size", [2, 4])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("what", ["plain", "salt", "lora", "images", "all"])
def test_a_block_is_described_as_vllm_does(what: str, first: int, hash_size: int) -> None:
    """Whatever determines vLLM's hash of a block, our announcement says the same as vLLM's own."""
    import numpy as np
    from vllm.distributed import kv_events
    from vllm.v1.core.block_pool import BlockPool

    from kvbm.logic.hashing import SequenceHasher
    from kvbm.vllm_integration.events import KvEvents

    changes: dict[str, Any] = {"hash_size": hash_size}
    if what in ("salt", "all"):
        changes["cache_salt"] = "salt"
    if what in ("lora", "all"):
        changes["lora_request"] = lora()
    if what in ("images", "all"):
        changes["mm_features"] = [image(1, 5), image(7, 2), image(9, 6)]
    request = make_request(**changes)
    pool = BlockPool(8, True, hash_size, enable_kv_cache_events=True)
    blocks = pool.get_new_blocks(4)
    pool.cache_full_blocks(request, blocks, first, 4, 4, 0)
    theirs: Any
    (theirs,) = pool.take_events()

    leader: Any = SimpleNamespace(
        pool=SimpleNamespace(
            tier="host",
            capacity=8,
            find=lambda hashes: np.arange(len(hashes)),
            states=lambda s: np.full(len(s), 3),
        ),
        disk=None,
        off_reason=None,
        lock=contextlib.nullcontext(),
        administered=False,
        subscribe=lambda subscriber: None,
    )
    ours = KvEvents(pool, leader, block_size=4, mode="dedup")
    hasher = SequenceHasher(b"root", 4)
    hasher.extend(request.all_token_ids[:])
    ours.note(request, hasher, first)
    event: Any
    (event,) = pool.take_events()
    assert event.medium == "CPU"
    assert theirs.medium == "GPU"
    assert isinstance(event, kv_events.BlockStored)
    assert msgspec.structs.replace(event, medium="GPU") == theirs
    assert not ours.failed


def test_rank_of_a_data_parallel_engine() -> None:
    """vLLM's publisher of each rank has a port of its own, and says the rank in every message."""
    from vllm.distributed import kv_events

    from kvbm.vllm_integration.events import Block, EventMerger

    merger = EventMerger(kv_events, block_size=2, mode="dedup", max_expected=8)
    merger.expect(b"k" * 16, Block(5, None, array("I", [1, 2]), (None, None), None), 1)
    context = zmq.Context.instance()
    subscriber = context.socket(zmq.SUB)
    publisher = kv_events.ZmqEventPublisher(3, endpoint="inproc://kvbm-events")
    try:
        subscriber.connect("inproc://kvbm-events_dp3")
        subscriber.subscribe(b"")
        publisher.publish(kv_events.KVEventBatch(ts=1.0, events=merger.take()))
        assert subscriber.poll(10_000)
        _, number, payload = subscriber.recv_multipart()
    finally:
        publisher.shutdown()
        subscriber.close(linger=0)
    batch: Any = msgspec.msgpack.decode(payload, type=kv_events.KVEventBatch)
    assert (int.from_bytes(number, "big"), batch.data_parallel_rank) == (0, 3)
    assert [(event.block_hashes, event.medium) for event in batch.events] == [([5], "CPU")]
