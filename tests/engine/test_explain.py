"""Why a request missed: each reason provoked in a real vLLM, and explained."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import disk_tools as disk
from tests.engine import explain_tools as explain
from tests.engine import scenarios
from tests.engine.conftest import TINY
from tests.engine.disk_tools import SMALL, SlowIo
from tests.engine.explain_tools import Told
from tests.engine.harness import BLOCK_SIZE, Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

METRICS = {"DYN_KVBM_METRICS": "1", "DYN_KVBM_METRICS_PORT": "0", "KVBM_METRICS_HOST": "127.0.0.1"}
OPTIONS = {**SMALL, "load_format": "dummy"}
HOST = 18  # blocks
BLOCKS = 4
NOTHING = "Nothing was missed: all blocks that could be of use were there."
NEVER = "these tokens were never seen, or too long ago."


def make(prompts: Prompts, seed: int, blocks: int = BLOCKS) -> Ask:
    return Ask(prompts.make(seed, blocks * BLOCK_SIZE + 3), 1)


def check(
    told: Told, reason: str | None, text: str, *, device: int = 0, host: int = 0, from_disk: int = 0
) -> None:
    """The tokens' origin in blocks. text: a pattern for the explanation."""
    assert told["reason"] == reason, told
    assert re.fullmatch(text, told["explanation"]), told
    origin = [told[f"{tier}_tokens"] // BLOCK_SIZE for tier in ("device", "host", "disk")]
    assert origin == [device, host, from_disk], told
    assert told["computed_tokens"] == told["prompt_tokens"] - sum(origin) * BLOCK_SIZE
    if not told["failed_tokens"]:  # vLLM counts what it was promised
        assert told["cached"] == sum(origin) * BLOCK_SIZE, "vLLM agrees"
    assert told["finished"]
    if reason and not text.startswith("KVBM"):
        assert told["missed_block"] == sum(origin)


# ---- host memory alone, and no cache on the device


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explain.make_adapter(tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture(scope="module")
def host(tiny: Path) -> Iterator[Engine]:
    env = {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(HOST), **METRICS}
    with Engine(
        tiny,
        kvbm={},
        env=env,
        enable_prefix_caching=False,
        enable_lora=True,
        max_lora_rank=8,
        **OPTIONS,
    ) as engine:
        engine.call(explain.wait_ready)
        yield engine


def test_never_seen_and_a_hit(host: Engine, prompts: Prompts) -> None:
    one = make(prompts, 900)
    check(host.call(explain.ask, one), "never seen", f"Block 0 was missed: {NEVER}")
    check(host.call(explain.ask, one), None, NOTHING, host=BLOCKS)
    longer = Ask(one.prompt[: BLOCKS * BLOCK_SIZE] + prompts.make(901, 70), 1)
    check(host.call(explain.ask, longer), "never seen", f"Block 4 was missed: {NEVER}", host=BLOCKS)
    check(host.call(explain.ask, Ask(prompts.make(902, 20), 1)), None, NOTHING)


def test_evicted(host: Engine, prompts: Prompts) -> None:
    one = make(prompts, 910)
    host.call(explain.ask, one)
    host.call(explain.ask, make(prompts, 911, HOST - 1))
    start = time.monotonic()
    time.sleep(1.2)
    told = host.call(explain.ask, one)
    check(
        told,
        "evicted",
        r"Block \d was missed: it was evicted from the host tier .*",
        host=told["missed_block"],
    )
    ago, needed = re.findall(r"(\d+\.\d) s before, when (\d+) blocks needed room", told["explanation"])[0]
    assert 1.1 <= float(ago) <= time.monotonic() - start + 5
    assert 1 <= int(needed) <= HOST


def test_other_salt(host: Engine, prompts: Prompts) -> None:
    one = make(prompts, 920)
    host.call(explain.ask, one)
    salted = Ask(one.prompt, 1, "tenant")
    text = "Block 0 was missed: another request had the same tokens under another salt or adapter.*"
    check(host.call(explain.ask, salted), "other salt or adapter", text)
    check(host.call(explain.ask, salted), None, NOTHING, host=BLOCKS)


def test_other_adapter(host: Engine, adapter: Path, prompts: Prompts) -> None:
    one = make(prompts, 925)
    host.call(explain.ask, one)
    text = "Block 0 was missed: another request had the same tokens under another salt or adapter.*"
    with_adapter = explain.ask_with_adapter
    check(host.call(with_adapter, one, str(adapter)), "other salt or adapter", text)
    check(host.call(with_adapter, one, str(adapter)), None, NOTHING, host=BLOCKS)


def test_failed_check(host: Engine, prompts: Prompts) -> None:
    """Told to the request that met it, of which vLLM computes the rest."""
    one = make(prompts, 930)
    host.call(explain.ask, one)
    host.call(scenarios.corrupt, one.prompt, 2)
    told = host.call(explain.ask, one)
    assert told["failed_tokens"] == BLOCK_SIZE
    check(told, "failed check", "Block 2 was missed: its record failed its check in the load.", host=2)
    check(host.call(explain.ask, one), None, NOTHING, host=BLOCKS)


def test_copy_failed(host: Engine, prompts: Prompts) -> None:
    one = make(prompts, 935)
    host.call(explain.ask, one)
    host.call(scenarios.fail, "onboard", 1)
    told = host.call(explain.ask, one)
    host.call(scenarios.restore)
    check(told, "copy failed", r"Block 0 was missed: its load failed or was given up \(error\).")


def test_still_being_written(host: Engine, prompts: Prompts) -> None:
    one = make(prompts, 940)
    host.call(scenarios.slow, "offload", 1.0)
    host.call(explain.ask_hastily, one)
    told = host.call(explain.ask, one)
    host.call(scenarios.restore)
    check(
        told, "still being written", "Block 0 was missed: its bytes were still on their way to the host tier."
    )


def test_tier_full(host: Engine, prompts: Prompts) -> None:
    """A running request's blocks are not evicted: it has the whole tier while another comes and goes."""
    host.call(explain.clear)
    big, one = Ask(make(prompts, 950, HOST).prompt, 60), make(prompts, 951)
    check(host.call(explain.crowded, big, one), "never seen", f"Block 0 was missed: {NEVER}")
    told = host.call(explain.ask, one)
    check(told, "tier full", r"Block 0 was missed: the host tier had no room for it \d+\.\d s before.")


def test_cleared(host: Engine, prompts: Prompts) -> None:
    one, salted = make(prompts, 960), Ask(make(prompts, 961).prompt, 1, "tenant")
    host.call(explain.ask, one)
    host.call(explain.ask, salted)
    assert host.call(explain.clear, None, "tenant") == BLOCKS
    text = r"Block 0 was missed: the host tier was cleared \d+\.\d s before."
    check(host.call(explain.ask, salted), "cleared", text)
    check(host.call(explain.ask, one), None, NOTHING, host=BLOCKS)
    assert host.call(explain.clear) > 0
    check(host.call(explain.ask, one), "cleared", text)


def test_prompt_logprobs(host: Engine, prompts: Prompts) -> None:
    """Such a request needs the whole prompt computed: vLLM says that it must not read any cache."""
    one = make(prompts, 970)
    host.call(explain.ask, one)
    wanted = host.call(explain.wanted)
    told = host.call(explain.ask_for_logprobs, one)
    assert host.call(explain.wanted) == wanted, "it has no part in the hit rate"
    check(told, "feature not supported", "KVBM was not asked: the request asks not to read the cache.")


def test_the_reasons_are_counted(host: Engine) -> None:
    counts = host.call(explain.misses)
    assert {"evicted", "failed check", "tier full", "cleared", "copy failed"} <= set(counts)
    assert counts["never seen"] > counts["failed check"] == 1


# ---- with a disk


@pytest.fixture(scope="module")
def slow_io(tmp_path_factory: pytest.TempPathFactory) -> SlowIo:
    return SlowIo(tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explained") / "disk"


@pytest.fixture(scope="module")
def deep(tiny: Path, folder: Path, slow_io: SlowIo) -> Iterator[Engine]:
    """With the filter of what is written to disk, as by default."""
    defaults = {"DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "", "KVBM_DISK_SKIP_SLOW_LOADS": ""}
    env = disk.settings(folder, host=24, disk=64, more={**defaults, **slow_io.env, **METRICS})
    with Engine(tiny, kvbm={}, env=env, enable_prompt_embeds=True, **OPTIONS) as engine:
        engine.call(disk.wait_ready)
        engine.call(explain.weigh_loads, False)
        yield engine


def test_hits_of_every_tier(deep: Engine, prompts: Prompts) -> None:
    one = make(prompts, 1000)
    check(deep.call(explain.ask, one), "never seen", f"Block 0 was missed: {NEVER}")
    check(deep.call(explain.ask, one), None, NOTHING, device=BLOCKS)
    check(deep.call(explain.again, one), None, NOTHING, host=BLOCKS)  # and so it is written to disk
    check(deep.call(explain.from_disk, one), None, NOTHING, from_disk=BLOCKS)


def test_not_admitted(deep: Engine, prompts: Prompts) -> None:
    one = make(prompts, 1010)
    deep.call(explain.ask, one)
    told = deep.call(explain.from_disk, one)
    text = (
        r"Block 0 was missed: it was evicted from the host tier \d+\.\d s before, when \d+ blocks needed "
        r"room, and it was not admitted to disk \d+\.\d s before, as it had been used only once."
    )
    check(told, "not admitted to disk", text)


def test_failed_check_on_disk(deep: Engine, folder: Path, prompts: Prompts) -> None:
    one = make(prompts, 1020)
    deep.call(explain.ask, one)
    deep.call(explain.again, one)
    deep.call(explain.damage_on_disk, str(folder), one, 1)
    told = deep.call(explain.from_disk, one)
    text = (
        r"Block 1 was missed: its record in the disk tier failed its check \d+\.\d s before and was dropped."
    )
    check(told, "failed check", text, from_disk=1)


def test_declined_as_slower(deep: Engine, slow_io: SlowIo, prompts: Prompts) -> None:
    one = make(prompts, 1030, 8)
    deep.call(explain.ask, one)
    deep.call(explain.again, one)
    deep.call(explain.weigh_loads, True)
    slow_io.set(read_s=2.0)
    deep.call(explain.from_disk, one)  # not known to be slow yet
    told = deep.call(explain.from_disk, one)
    slow_io.set()
    deep.call(explain.weigh_loads, False)
    text = "Block 0 was missed: it was on disk but not read: computing it is faster."
    check(told, "load declined as slower", text)


def test_prompt_embeddings(deep: Engine) -> None:
    told = deep.call(explain.ask_with_embeddings, 3 * BLOCK_SIZE)
    assert told["reason"] == "feature not supported"
    assert told["explanation"] == "KVBM was not asked: prompt embeddings."


def test_cleared_from_disk(deep: Engine, prompts: Prompts) -> None:
    one = make(prompts, 1040)
    deep.call(explain.ask, one)
    deep.call(explain.again, one)
    deep.call(explain.lose_host)
    assert deep.call(explain.clear, "disk") > 0
    text = r"Block 0 was missed: the disk tier was cleared \d+\.\d s before."
    check(deep.call(explain.again, one), "cleared", text)


def test_other_namespace(deep: Engine, tiny: Path, folder: Path, tmp_path: Path, prompts: Prompts) -> None:
    """Another model with records of the same size: what it finds can't be its own."""
    one = make(prompts, 1050)
    deep.call(explain.ask, one)
    deep.call(explain.again, one)
    deep.close()
    other = shutil.copytree(tiny, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**TINY, "rope_theta": 5000.0}))
    env = disk.settings(folder, host=24, disk=64, more=METRICS)
    with Engine(other, kvbm={}, env=env, **OPTIONS) as engine:
        assert engine.call(disk.wait_ready).recovered == 0
        told = engine.call(explain.ask, one)
        check(told, "other namespace", "Block 0 was missed: the disk cache was of another model.*")
        check(engine.call(explain.again, one), None, NOTHING, host=BLOCKS)
