"""KVBM behind the HiCache controllers, host pools and storage threads of older versions of SGLang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvbm

# Installed there by scripts/setup_sglang.sh, which says why these.
OLDER = Path(sys.prefix) / "older"
VERSIONS = ("0.5.9", "0.5.15")
ROUND_TRIP = {
    "before": 0,
    "stored": 3,
    "loaded": 3,
    "longer": 3,  # of five pages
    "other": 0,
    "gap": [1, 3],
    "exists": [True, False],
    "cleared": 0,
    "failed_store": 0,
    "stored_again": 3,
    "failed_load": 0,
    "loaded_again": 3,
    "after_reset": 3,
}
RESTART = {"stored": 3, "loaded": 3}


@pytest.mark.parametrize("version", VERSIONS)
def test_pages_come_back_as_they_were(version: str, tmp_path: Path) -> None:
    if not (OLDER / version).is_dir():
        pytest.skip(f"SGLang {version} is not in {OLDER}: run scripts/setup_sglang.sh")
    # Their hash functions have one name and different sources: in one folder each would build it anew.
    extensions = str(OLDER / version / "torch_extensions")
    path = os.pathsep.join((str(OLDER / version), str(Path(kvbm.__file__).parents[1])))
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("older_child.py"), tmp_path],
        env={**os.environ, "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": extensions},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    seen = json.loads(child.stdout.splitlines()[-1])
    assert seen.pop("version") == version
    assert seen.pop("file").startswith(str(OLDER / version))
    (hook,) = seen["weights"].pop("hooks")
    assert hook == "ModelRunner.update_weights_from_disk"
    assert seen == {
        "page_first-zero_copy": ROUND_TRIP,
        "page_first-zero_copy-disk": RESTART,
        "layer_first-generic": ROUND_TRIP,
        "layer_first-generic-disk": RESTART,
        "weights": {"changing": True, "during": 0, "flushed": True, "after": 0, "anew": 3},
    }
