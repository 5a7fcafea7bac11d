#!/usr/bin/env bash
# ibm-fms 1.13.1 requires transformers 4.57.6, which neither environment has. It is installed into
# build/live, which comes before .venv-check on PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/../.."
site=build/live
packages="transformers==4.57.6 tokenizers==0.22.2 regex==2026.11.15"
if [ "$(cat $site/.packages 2>/dev/null)" != "$packages" ]; then
    rm -rf $site
    # shellcheck disable=SC2086 - a list of packages
    .venv-check/bin/python -m pip install --quiet --no-deps --target $site $packages
    echo "$packages" >$site/.packages
fi
