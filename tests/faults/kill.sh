#!/usr/bin/env bash
# kill -9 at random times of a run with frequent checkpoints, then resume, over and over: always resumable, and the final
# adapters have the bytes of the undisturbed run. KILLS (20) is how often; KILL_SEED repeats a sequence of times.
# Mutations seen caught: the cursor's place in the epoch not restored (adapters differ); the length of metrics.jsonl not
# kept (steps are missing).
. "$(dirname "$0")/../script.sh"
kills=${KILLS:-20}
RANDOM=${KILL_SEED:-$$}
echo "KILL_SEED=${KILL_SEED:-$$} KILLS=$kills"
"$MAKE_TINY" "$work"
cd "$work"
began=$(date +%s%N)
"$ESPALIER" run recipe.yaml --quiet --output "$work/straight" || fail "the undisturbed run"
whole=$((($(date +%s%N) - began) / 1000000))
[ "$whole" -gt 20 ] || whole=20
done_kills=0 rounds=0
while [ "$done_kills" -lt "$kills" ]; do
  rounds=$((rounds + 1))
  rm -rf "$work/killed"
  verb=(run recipe.yaml --output "$work/killed")
  while :; do
    "$ESPALIER" "${verb[@]}" --quiet 2> err.txt &
    pid=$!
    pause=0
    if [ "$done_kills" -lt "$kills" ]; then
      # up to half the whole run's time: start-up, steps, checkpoints, evaluation, task ends are all hit
      pause=$((RANDOM % (whole / 2) + 1))
      sleep "$(printf '0.%03d' $((pause % 1000)))"
      kill -9 "$pid" 2> /dev/null && done_kills=$((done_kills + 1))
    fi
    code=0
    wait "$pid" 2> /dev/null || code=$?
    case $code in
      0) break ;;
      137) ;;
      *) cat err.txt >&2; fail "exit code $code after $done_kills kills (${verb[*]})" ;;
    esac
    if [ -f "$work/killed/recipe.yaml" ]; then
      verb=(resume "$work/killed")
    else # killed before the run directory was complete: nothing to resume, the run starts again
      verb=(run recipe.yaml --overwrite --output "$work/killed")
    fi
  done
  same_adapters "$work/straight" "$work/killed"
  cmp "$work/straight/matrix.json" "$work/killed/matrix.json" || fail "the score matrix differs"
  steps=$(grep -c '^{"step":' "$work/killed/metrics.jsonl")
  [ "$steps" = "$(grep -c '^{"step":' "$work/straight/metrics.jsonl")" ] || fail "metrics.jsonl holds $steps steps"
  left=$(find "$work/killed" -name '*staged*' -o -name '*.removed' -o -name '*.tmp*' | head -3)
  [ -z "$left" ] || fail "left behind: $left"
done
echo "$done_kills kills in $rounds runs, each resumed to the same bytes"
