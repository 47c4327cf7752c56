"""Two engines, one disk: what vLLM has stored SGLang serves, and the other way round."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.sglang.harness import Engine, linker, storage
from tests.sglang.prompts import Prompt, prompts, whole_pages
from tests.sglang.vllm_side import PAGE

ROOT = Path(__file__).parents[2]
LENGTHS = (600, 333, 70)

pytestmark = pytest.mark.timeout(300)


def settings(folder: Path) -> dict[str, Any]:
    disk = {"cache_gb": 0.1, "dir": str(folder), "exchange": True, "disable_filter": True}
    return {"host": {"cache_gb": 0.05}, "disk": disk}


def vllm(model: Path, folder: Path, asks: list[Prompt]) -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG", "VIRTUAL"))}
    env |= {
        "PATH": f"{ROOT}/.venv/bin:/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}/src:{ROOT}",
        "DYN_KVBM_CPU_CACHE_GB": "0.05",
        "DYN_KVBM_DISK_CACHE_GB": "0.1",
        "DYN_KVBM_DISK_CACHE_DIR": str(folder),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "1",
        "KVBM_DISK_EXCHANGE": "1",
        "KVBM_DISK_SKIP_SLOW_LOADS": "0",
    }
    done = subprocess.run(
        [f"{ROOT}/.venv/bin/python", "-m", "tests.sglang.vllm_side", str(model)],
        input=json.dumps(asks).encode(),
        env=env,
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return json.loads(done.stdout)


def test_vllm_and_sglang(keen: Path, plain: Engine, tmp_path: Path) -> None:
    of_vllm, of_sglang = prompts(1, *LENGTHS), prompts(2, *LENGTHS)
    right = [plain.run([ask]).tokens[0] for ask in of_vllm + of_sglang]

    stored = vllm(keen, tmp_path, of_vllm)
    assert [answer["tokens"] for answer in stored] == right[:3]
    assert [answer["cached"] for answer in stored] == [0, 0, 0]

    with Engine(keen, page_size=PAGE, **storage(settings(tmp_path), prefetch_threshold=PAGE)) as engine:
        ran = [engine.run([ask]) for ask in of_vllm + of_sglang]
        assert [one.tokens[0] for one in ran] == right
        assert [one.storage[0] for one in ran] == [*whole_pages(of_vllm, PAGE), 0, 0, 0]
        time.sleep(1)  # SGLang hands pages over in the background, and says of none when it is done

    found = vllm(keen, tmp_path, of_vllm + of_sglang)
    assert [answer["tokens"] for answer in found] == right
    assert [answer["cached"] for answer in found] == whole_pages(of_vllm + of_sglang, PAGE)

    with Engine(keen, page_size=PAGE, **linker(settings(tmp_path))) as engine:
        for ask, want, most in zip(
            of_vllm + of_sglang, right, whole_pages(of_vllm + of_sglang, PAGE), strict=True
        ):
            end = time.monotonic() + 20
            while True:  # what only the disk has is a miss for the first who asks
                ran = engine.run_anew([ask])
                assert ran.tokens == [want]
                if ran.host == [most]:
                    break
                assert time.monotonic() < end
