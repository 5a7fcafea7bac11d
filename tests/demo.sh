#!/usr/bin/env bash
# The whole job in one go: record with Hugging Face, check FMS without it, see a broken port fail.
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=tests/checkpoints/tiny-idefics3
checkout=build/fms-checkout
work=build/demo
# The checkout preprocesses with its own code: Hugging Face's processor needs transformers.
export IDEFICS3_PREPROCESSOR=own
rm -rf $work
mkdir -p $work

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() {
    printf '$ snap %s\n' "$*"
    "$environment/bin/snap" "$@"
}

say "1. Record: the real transformers answers, in $PWD/.venv-record"
environment=.venv-record
run record --checkpoint $checkpoint --goldens $work/goldens

say "2. Check: FMS answers, in an environment that has no transformers"
environment=.venv-check
if $environment/bin/python -c 'import transformers' 2>/dev/null; then
    echo "transformers is installed in $environment: this would prove nothing" >&2
    exit 1
fi
run check --checkpoint $checkpoint --goldens $work/goldens --fms-path $checkout

say "3. The same FMS with one fault: the wrong GELU in the vision encoder"
$environment/bin/python tests/fms_checkout/faults.py exact-gelu $work/broken-fms
git -C $work/broken-fms --no-pager diff --unified=0 -- fms | tail -n 3
code=0
run check --checkpoint $checkpoint --goldens $work/goldens --fms-path $work/broken-fms \
    --html $work/report.html || code=$?
if [ $code -ne 1 ]; then
    echo "the fault was not found: exit code $code" >&2
    exit 1
fi
say "The fault was found, in the phase that has it: exit code 1. To look at it: $work/report.html"
