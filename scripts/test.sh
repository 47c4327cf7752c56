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
# A browser for the page's tests and Prometheus for the dashboard's, which are skipped where they can't be had.
# Prometheus is only unpacked: Debian's package would start a server.
PATH=$PATH:$ROOT/.venv/prometheus/usr/bin
has_browser() { command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null; }
has_prometheus() { command -v promtool >/dev/null; }
if command -v apt-get >/dev/null && ! { has_browser && has_prometheus; }; then
    echo "test: installing a headless Chromium (as root) and unpacking Prometheus, some 120 MB to download"
    {
        if [ "$(id -u)" = 0 ]; then
            timeout 120 apt-get update -q
            has_browser || DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -yq \
                --no-install-recommends chromium-headless-shell fonts-dejavu-core
        fi
        has_prometheus || (cd .venv && timeout 120 apt-get download prometheus && dpkg -x prometheus_*.deb prometheus)
    } >.venv/apt.log 2>&1 || true
    { has_browser && has_prometheus; } || echo "test: not all can be had, see .venv/apt.log"
fi

ruff check .
ruff format --check .
pyright
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# A real SGLang, in an environment of its own on top of this one. It is set up while other tests run.
sglang=
if grep -q ^cpu .venv/kvbm-engine.stamp; then
    bash scripts/setup_sglang.sh >.venv/sglang.log 2>&1 &
    sglang=$!
    trap 'kill "$sglang" 2>/dev/null || true' EXIT
fi
# Fast tests first: a mistake in the logic should not wait for an engine to start.
python -m pytest tests/unit tests/property tests/storage tests/trtllm tests/gpu -m "not gpu and not engine"
python -m pytest -m "engine and not gpu"
if [ -n "$sglang" ]; then
    wait "$sglang" || { cat .venv/sglang.log && exit 1; }
    .venv-sglang/bin/python -m pytest tests/sglang
fi
