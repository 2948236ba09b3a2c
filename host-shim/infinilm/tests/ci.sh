#!/usr/bin/env bash
# Installs the package as a user would, checks its style and runs its tests. Those that need InfiniLM are skipped where
# it is missing; the summary says how many, and why.
set -euo pipefail
cd "$(dirname "$0")/../../.."

venv="${CARGO_TARGET_DIR:-target}/infinilm-venv"
# Without pip it is one that was cut off.
[ -x "$venv/bin/pip" ] || python3 -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "./host-shim/infinilm[test]"
"$venv/bin/ruff" format --check --quiet host-shim/infinilm
"$venv/bin/ruff" check --quiet host-shim/infinilm
"$venv/bin/python" -m pytest -q -rs host-shim/infinilm/tests
