#!/usr/bin/env bash
# The live way, as a test: FMS and Hugging Face in one process.
set -euo pipefail
cd "$(dirname "$0")/../.."
bash tests/live/install.sh
PYTHONPATH=build/live .venv-check/bin/python -m pytest -m live -n 2 tests/live
