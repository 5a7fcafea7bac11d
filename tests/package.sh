#!/usr/bin/env bash
# Wheel and sdist build, install outside the repository, and run there: bash tests/package.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
repository=$PWD
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

# The sdist is made from a copy, so that no build folder is left here; the wheel is made from it.
mkdir "$place/source"
git ls-files -z -- snapshot_tool pyproject.toml README.md LICENSE | xargs -0 cp --parents -t "$place/source"
cd "$place/source"
"$python" -c 'import setuptools.build_meta as b; b.build_sdist("..")' >"$place/log" 2>&1 || { cat "$place/log"; exit 1; }
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$place" "$place"/*.tar.gz

# What snap needs comes from the environment that is here; snap itself from the wheel alone.
cd "$place"
"$python" -m venv fresh
needs=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$(fresh/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$needs" >"$site/needs.pth"
fresh/bin/python -m pip install --quiet --no-deps --no-index --ignore-installed ./*.whl
fresh/bin/python -c "
import snapshot_tool
assert snapshot_tool.__file__.startswith('$site'), snapshot_tool.__file__"
[ -f "$(echo "$site"/snapshot_tool/py.typed)" ]
fresh/bin/snap doctor --fms-path "$repository/build/fms-checkout" --goldens "$repository/goldens"
fresh/bin/fms-snap verify --goldens "$repository/goldens"
fresh/bin/snap demo --out demo | grep '^PASS\|^FAIL\|^open'
[ "$(stat -c %s ./*.whl)" -lt 3000000 ]
echo "packaged: $(ls ./*.whl ./*.tar.gz | xargs -n1 basename | tr '\n' ' ')"
