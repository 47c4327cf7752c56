#!/usr/bin/env bash
# Sets up what the tests need, checks style and types, and runs all tests that need no GPU.
#
#     bash scripts/test.sh              everything, as CI does
#     bash scripts/test.sh tests/unit   these tests only (arguments go to pytest)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
bash scripts/setup.sh
PATH=$ROOT/.venv/bin:$PATH
python -m pip install -q --disable-pip-version-check -c .venv/constraints.txt -e ".[test,dev]"
# A backend of the disk tier. Without its dependencies: it would bring CUDA's torch, which it does not use.
python -m pip install -q --disable-pip-version-check --no-deps nixl-cu12==1.5.1
python scripts/prepare_model.py

ruff check .
ruff format --check .
pyright
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# Fast tests first: a mistake in the logic should not wait for an engine to start.
python -m pytest tests/unit tests/property tests/storage -m "not gpu and not engine"
python -m pytest -m "engine and not gpu"
