#!/usr/bin/env bash
# What can go wrong with a device, in the simulation: no driver, one too old, no device, a plug-in that cannot be opened,
# memory that another process holds, the device lost in the middle of a run. Each is one line and the right exit code;
# `auto` falls back to the cpu; after a loss the last checkpoint is whole and the run resumes to the same bytes.
# Mutation seen caught: every allocation that gives NULL reported as missing memory (exit code 4 for a lost device).
. "$(dirname "$0")/cuda_sim.inc"
go straight cuda

# refused CODE WORDS ENVIRONMENT: `run` on cuda ends so, with one line and no folder
refused() {
  local want=$1 words=$2 code=0
  shift 2
  rm -rf "$work/refused"
  (export "$@" && exec "$ESPALIER" run recipe.yaml --quiet --device cuda "${short[@]}" --output "$work/refused" > log.txt 2> err.txt) || code=$?
  [ $code = "$want" ] || { cat log.txt err.txt >&2; fail "$*: exit code $code, not $want"; }
  [ "$(wc -l < err.txt)" = 1 ] || { cat err.txt >&2; fail "$*: not one line"; }
  grep -Eq -- "$words" err.txt || { cat err.txt >&2; fail "$*: the line does not say '$words'"; }
  [ ! -e "$work/refused" ] || fail "$*: left a folder"
  echo "$*: $(cat err.txt)"
}
refused 5 "driver" SIMCUDA_DRIVER=none
refused 5 "driver" SIMCUDA_DRIVER=11040
refused 5 "no (CUDA )?device|no CUDA-capable" SIMCUDA_DEVICES=0
refused 5 "nowhere.so" ESPALIER_CUDA_PLUGIN="$work/nowhere.so"
refused 5 "cuda" ESPALIER_CUDA_PLUGIN="$ESPALIER"

# `auto` then takes the cpu and says so nowhere but in what it was asked for
(export SIMCUDA_DRIVER=none && go fallback auto)
go on_cpu cpu
same_bytes on_cpu fallback

# doctor names what it found, and why not
SIMCUDA_DRIVER=none "$ESPALIER" doctor > log.txt || fail "doctor without a driver"
grep -qi "driver" log.txt || { cat log.txt >&2; fail "doctor does not say why CUDA is not used"; }
"$ESPALIER" doctor > log.txt || fail "doctor"
grep -qi "cudnn" log.txt || { cat log.txt >&2; fail "doctor does not name the libraries"; }

sums() { (cd "$work/ended/checkpoints" && find . -type f -exec cksum {} + | sort); }
# ended CODE WORDS ENVIRONMENT: a run that ends in its middle; it resumes to the bytes of the undisturbed one
ended() {
  local want=$1 words=$2 code=0 kept left
  shift 2
  rm -rf "$work/ended"
  code=0
  "$ESPALIER" run recipe.yaml --quiet --device cuda "${short[@]}" --stop-after 2 --output "$work/ended" > log.txt 2>&1 || code=$?
  [ $code = 6 ] || { cat log.txt >&2; fail "--stop-after: exit code $code"; }
  kept=$(sums)
  code=0
  (export "$@" && exec "$ESPALIER" resume "$work/ended" --quiet --device cuda > log.txt 2> err.txt) || code=$?
  [ $code = "$want" ] || { cat log.txt err.txt >&2; fail "$*: exit code $code, not $want"; }
  [ "$(wc -l < err.txt)" = 1 ] || { cat err.txt >&2; fail "$*: not one line"; }
  grep -Eq -- "$words" err.txt || { cat err.txt >&2; fail "$*: the line does not say '$words'"; }
  # a run that came further has written a later one
  [ "$(sums)" = "$kept" ] || [[ $(ls "$work/ended/checkpoints" | tail -1) > "checkpoint-00000002" ]] || fail "$*: checkpoints changed"
  left=$(find "$work/ended" -name '*staged*' -o -name '*.removed' -o -name '*.tmp*' | head -3)
  [ -z "$left" ] || fail "$*: left behind: $left"
  echo "$*: $(cat err.txt)"
  "$ESPALIER" resume "$work/ended" --quiet --device cuda > log.txt 2>&1 || { cat log.txt >&2; fail "resume after $*"; }
  same_bytes straight ended
}
peak=$(value straight/result.json device_peak)
# another process holds nearly all: no room for the backend's own, for the weights, for what a step holds. The plan sees
# the device's size and not its neighbours.
for missing in 1000000 300000 50000; do
  ended 4 "do not fit: .* are free \\(another process" SIMCUDA_MEMORY=$((8 << 30)) SIMCUDA_OCCUPIED=$(((8 << 30) - peak + missing))
done
# the device is lost: while weights are loaded, in a kernel of a step, in a product, in a piece that is replayed
ended 5 "ECC" SIMCUDA_FAIL_AFTER=1 SIMCUDA_FAIL_WITH=214
ended 5 "^cuda: .*LaunchFailure" SIMCUDA_FAIL_AFTER=40
for launch in 60 200 700; do
  ended 5 "^cuda: " SIMCUDA_FAIL_AFTER=$launch
done
echo "faults of a device: one line each, nothing lost"
