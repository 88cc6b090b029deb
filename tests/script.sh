# Sourced by the tests that are scripts. Gives $work (a fresh folder, removed at the end), espalier, fail and skip.
# From the environment: ESPALIER (the program), MAKE_TINY, ESP_SOURCE_DIR, ESP_SHARED_DIR.
set -euo pipefail
: "${ESPALIER:?the program}" "${MAKE_TINY:?the maker of the tiny model}"
work=$(mktemp -d "${TMPDIR:-/tmp}/espalier-test-XXXXXX")
cleanup() { rm -rf "$work"; }
trap cleanup EXIT
fail() { echo "FAILED: $*" >&2; exit 1; }
skip() { echo "SKIPPED: $*"; exit 77; }
# The runs below work on matrices too small to share: one thread each is the fastest.
export ESPALIER_THREADS=${ESPALIER_THREADS:-1}
same_adapters() { # run directories; every task's adapter has the same bytes
  local task
  for task in a b; do
    cmp "$1/adapters/$task/adapter_model.safetensors" "$2/adapters/$task/adapter_model.safetensors" ||
      fail "adapter $task differs between $1 and $2"
  done
}
