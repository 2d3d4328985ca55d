#!/usr/bin/env bash
# Makes .venv with everything the project needs, at the versions of constraints.txt. Does nothing when that is done.
set -euo pipefail
cd "$(dirname "$0")"
wanted=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: PYTHON=python3.12 ./setup.sh" >&2; exit 1; }
"$python" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet --constraint constraints.txt torch # first: any other package would pull its own choice of torch
$pip install --quiet --constraint constraints.txt --editable '.[dev,longbench]'
echo "$wanted" > .venv/installed
