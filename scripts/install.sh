#!/usr/bin/env bash
# Make a virtual environment with pinned dependencies and dbtrain in it.
# Where PyTorch comes from: the package index that pip is set up with, or PYTORCH_INDEX_URL. On a machine without a GPU
# set that to PyTorch's CPU wheels (https://pytorch.org/get-started), or the CUDA libraries come along (several GB).
set -euo pipefail
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv}
for tool in g++ "$PYTHON"; do
  command -v "$tool" >/dev/null || { echo "error: $tool is missing: install it (Debian: apt-get install g++ python3-dev python3-venv make)" >&2; exit 1; }
done
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
  { echo "error: $("$PYTHON" --version) is not between 3.10 and 3.12: set PYTHON=python3.11" >&2; exit 1; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check -q)
"${pip[@]}" install -U pip "setuptools>=77" wheel ninja
echo "installing PyTorch, then Ray, DeepSpeed and the rest into $VENV: 2.7 GB without CUDA, 6.4 GB with it"
"${pip[@]}" install ${PYTORCH_INDEX_URL:+--index-url "$PYTORCH_INDEX_URL"} "$(grep '^torch==' requirements.txt)"
# DeepSpeed's setup imports torch, so it is built against the one just installed
DS_BUILD_OPS=0 "${pip[@]}" install --no-build-isolation -r requirements.txt
"${pip[@]}" install --no-build-isolation --no-deps -e .
