"""Two engines of one deployment on one machine, which share a folder and the first port of the page."""

import json
from pathlib import Path

import pytest

from tests.engine import features
from tests.engine.features import Query
from tests.engine.pair import Pair
from tests.engine.prompts import Prompts
from tests.engine.test_server import Server


@pytest.mark.feature("Data parallel, several engines on one machine")
def test_two_replicas(pair: Pair, keen: Path, prompts: Prompts, tmp_path: Path) -> None:
    """vLLM sends each request to the replica that it names. Device memory holds two of the four prompts."""
    queries = [Query(prompt) for prompt in prompts.batch(980, [200, 230, 260, 290])]
    disk = {"DYN_KVBM_DISK_CACHE_GB": "0.1", "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path)}
    server = Server(keen, tmp_path, "--data-parallel-size", "2", DYN_KVBM_METRICS="1", **disk)
    try:
        with pair.engines(keen) as plain:
            want = plain.plain(features.run, queries)().tokens
        server.wait_ready()
        for _ in range(2):
            for query, answer in zip(queries, want, strict=True):
                asked = {"model": "m", "prompt": query.prompt, "max_tokens": 8, "temperature": 0}
                asked |= {"ignore_eos": True, "return_token_ids": True}
                for replica in ("0", "1"):
                    got = json.loads(server.get("/v1/completions", asked, X_data_parallel_rank=replica))
                    assert got["choices"][0]["token_ids"] == answer
        metrics = server.get("/metrics").splitlines()
        hits = [line for line in metrics if line.startswith("vllm:external_prefix_cache_hits_total{")]
        assert len(hits) == 2
        assert all(float(line.split()[-1]) >= 192 + 224 for line in hits)
        folders = sorted(path.name for path in tmp_path.glob("kvbm-*"))
        assert folders == ["kvbm-0", "kvbm-1"]
        assert all(list((tmp_path / folder).rglob("records-*")) for folder in folders)
        pages = [line for line in server.log.read_text().splitlines() if "administration at http" in line]
        assert len({line.split("http://")[1].split(",")[0] for line in pages}) == 2
    finally:
        server.kill()
