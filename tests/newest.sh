#!/usr/bin/env bash
# Imports, trains and exports on this machine's newest Python (3.12 or later) with the newest JAX, if there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=.venv-newest

# Prints "minor-version path" where a final 3.12+ runs and can make an environment; shims that do nothing print nothing.
probe() {
    "$1" - 2>/dev/null <<'PROBE' || true
import ensurepip, ssl, sys, sysconfig, venv
if sys.version_info >= (3, 12) and sys.version_info.releaselevel == "final" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print(sys.version_info.minor, sys.executable)
PROBE
}

candidates() {
    for minor in 15 14 13 12; do
        command -v "python3.$minor" || true
    done
    if command -v pyenv >/dev/null; then
        ls "$(pyenv root)"/versions/3.*/bin/python 2>/dev/null || true
    fi
}

PYTHON=$(for candidate in $(candidates); do probe "$candidate"; done | sort -rn | head -n 1 | cut -d ' ' -f 2-)
if [ -z "$PYTHON" ]; then
    echo "newest: no Python 3.12 or later runs here, so nothing is tried with the newest JAX."
    exit 0
fi

if [ ! -e "$VENV/.installed" ] || [ pyproject.toml -nt "$VENV/.installed" ]; then
    echo "newest: installing specjax for $PYTHON into $VENV: some minutes, the first time."
    "$PYTHON" -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable .
    touch "$VENV/.installed"
fi
"$VENV/bin/python" tests/smoke.py
