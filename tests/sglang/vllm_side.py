"""A real vLLM with KVBM for tests of the other environment: prompts in on stdin, answers out on stdout.

.venv/bin/python -m tests.sglang.vllm_side MODEL < prompts.json
"""

import json
import os
import sys
from typing import Any

PAGE = 32


def main(model: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    from tests.engine import disk_tools, scenarios

    llm = LLM(
        model,
        dtype="float32",
        block_size=PAGE,
        max_model_len=1024,
        enforce_eager=True,
        num_gpu_blocks_override=128,
        kv_cache_memory_bytes=100_000_000,
        gpu_memory_utilization=0.1,
        skip_tokenizer_init=True,
        kv_transfer_config={
            "kv_connector": "DynamoConnector",
            "kv_role": "kv_both",
            "kv_connector_module_path": "kvbm.vllm_integration.connector",
        },
    )
    disk_tools.wait_ready(llm)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    asks: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = [llm.generate([ask], sampling, use_tqdm=False)[0] for ask in asks]
    scenarios.drain(llm)
    return [
        {"tokens": list(answer.outputs[0].token_ids), "cached": answer.num_cached_tokens}
        for answer in answers
    ]


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    out = os.dup(1)  # vLLM logs there
    os.dup2(2, 1)
    result = main(sys.argv[1], json.load(sys.stdin))
    os.write(out, json.dumps(result).encode())
