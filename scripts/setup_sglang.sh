#!/usr/bin/env bash
# Sets up .venv-sglang, in which tests/sglang run a real SGLang on a CPU: bash scripts/setup_sglang.sh
#
# It is a layer on the .venv of scripts/setup.sh, with what that lacks: some 420 MB to download, 1.6 GB of disk.
# A second run finds what is there and ends at once.
#
# Nothing here may bring CUDA's packages: so no dependency is resolved, all are named.
set -euo pipefail

PACKAGES=(
    sglang==0.5.23
    # Imported by SGLang at start, needed or not. The line below: by its test kits.
    compressed-tensors==0.18.0 orjson==3.13.0 pandas==3.1.1 scipy==1.17.1 soundfile==0.13.1 torchvision==0.28.0 triton==3.9.0
    datasets==5.2.0 multiprocess==0.70.19 pyarrow==26.0.1 zstandard==0.25.0
    # IPython and what that imports
    ipython==9.18.1 ipython_pygments_lexers==1.1.1 asttokens==3.0.2 executing==2.3.0 jedi==0.20.1 matplotlib-inline==0.2.2
    parso==0.8.7 pexpect==4.9.0 prompt_toolkit==3.0.53 ptyprocess==0.7.0 pure_eval==0.2.4 stack-data==0.6.3
    traitlets==5.16.1 wcwidth==0.9.4
)
# Whose controllers tests/sglang/test_older.py runs: the oldest, and the newest that is small (later ones have 25 MB and
# more). They find the rest of what they need above.
OLDER=(0.5.9 0.5.15)
DISK_MB=3000
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BASE=$ROOT/.venv
VENV=$ROOT/.venv-sglang
PY=$VENV/bin/python
LOG=$VENV/setup.log
STAMP=$VENV/kvbm.stamp
PLUGIN=$ROOT/tests/sglang/cpu_plugin
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONPATH PYTHONHOME

say() { printf 'setup_sglang: %s\n' "$*"; }
fail() {
    printf '\nsetup_sglang: FAILED: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}
pip_install() {
    "$PY" -m pip install -q --no-deps "$@" >>"$LOG" 2>&1 && return
    tail -n 6 "$LOG" >&2
    fail "pip could not install ${*: -1}." "The lines above are the end of $LOG." \
        "It needs a package index: check the network, 'pip config list' and the PIP_* variables, then run this again."
}

case $(cat "$BASE/kvbm-engine.stamp" 2>/dev/null) in
cpu*) ;;
cuda*) fail "$BASE has a CUDA vLLM, and these tests run on its torch for CPUs." ;;
*) fail "$BASE is not ready." "Run this first: bash scripts/setup.sh" ;;
esac

KEY=$({
    "$BASE/bin/python" -V
    echo "$ROOT"
    cat "$BASE/kvbm-engine.stamp"
    find "${BASH_SOURCE[0]}" "$PLUGIN" -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 cat
} | sha256sum)
if [ "$(cat "$STAMP" 2>/dev/null)" = "$KEY" ]; then
    say "$VENV is ready"
    exit
fi

free=$(df -Pm "$ROOT" | awk 'NR == 2 { print $4 }')
[ "$free" -ge "$DISK_MB" ] || fail "too little disk: $free MB free at $ROOT, about $DISK_MB MB are needed."
say "making $VENV with SGLang: some 420 MB to download"
"$BASE/bin/python" -m venv --clear "$VENV" || fail "$BASE/bin/python could not make $VENV."
: >"$LOG"
pip_install "${PACKAGES[@]}"
pip_install "$PLUGIN"
for version in "${OLDER[@]}"; do
    pip_install --target "$VENV/older/$version" "sglang==$version"
done
# After those of its own it sees the packages of .venv; only now, as pip would look at them.
"$BASE/bin/python" - >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz-base.pth" <<'PY'
import sysconfig

print(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})")
PY

# SGLang compiles its hash function where it first needs it, with what PATH names. The result holds for this .venv only.
say "building SGLang's hash function"
ln -s "$BASE/bin/ninja" "$VENV/bin/ninja"
PATH=$VENV/bin:$PATH TORCH_EXTENSIONS_DIR=$VENV/torch_extensions "$PY" - >>"$LOG" 2>&1 <<'PY' || {
from array import array

from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash

get_native_hash(array("q", range(16)), None, 16)
PY
    grep -E 'error|Error' "$LOG" | tail -n 4 >&2
    fail "SGLang's hash function could not be built; all of it is in $LOG." \
        "It needs a C++ compiler and OpenSSL's headers (Debian, Ubuntu: apt-get install g++ libssl-dev)."
}
printf '%s\n' "$KEY" >"$STAMP"
say "$VENV is ready"
