#!/usr/bin/env bash
# From a bare machine to the demonstration: environment, model, chats with KVBM and without.
# Arguments go to `kvbm bench chat` (see --help there).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

bash "$ROOT/scripts/setup.sh"
case " $* " in
*" --model"* | *" -h "* | *" --help "*) ;;
*)
    "$VENV/bin/python" "$ROOT/scripts/prepare_model.py"
    set -- --model "$ROOT/.models/SmolLM2-135M-Instruct" "$@"
    ;;
esac
exec "$VENV/bin/python" -m kvbm.bench.chat "$@"
