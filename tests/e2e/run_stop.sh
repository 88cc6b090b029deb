#!/usr/bin/env bash
# Signals through the program: SIGTERM and SIGUSR1 finish the step, write a complete checkpoint and end with code 6; the
# resumed run has the bytes of the undisturbed one. Exit codes of refusals and of a run that diverges.
# Mutation seen caught: `interrupted` (loop.c) returning without its checkpoint.
. "$(dirname "$0")/../script.sh"
"$MAKE_TINY" "$work"
cd "$work"
"$ESPALIER" run recipe.yaml --quiet --output "$work/straight" || fail "the undisturbed run"
for signal in TERM USR1; do
  rm -rf "$work/stopped"
  "$ESPALIER" run recipe.yaml --quiet checkpoint.every=1000 --output "$work/stopped" > /dev/null 2> err.txt &
  pid=$!
  for _ in $(seq 1 2000); do # until it steps
    [ -s "$work/stopped/metrics.jsonl" ] && grep -q '^{"step":2,' "$work/stopped/metrics.jsonl" && break
    sleep 0.005
  done
  kill -"$signal" "$pid" || fail "the run ended before the signal"
  code=0
  wait "$pid" || code=$?
  [ "$code" = 6 ] || { cat err.txt; fail "SIG$signal: exit code $code, not 6"; }
  newest=$(ls "$work/stopped/checkpoints" | tail -1)
  steps=$(grep -c '^{"step":' "$work/stopped/metrics.jsonl")
  [ "${newest#checkpoint-}" = "$(printf %08d "$steps")" ] || fail "SIG$signal after step $steps: the newest checkpoint is $newest"
  "$ESPALIER" resume "$work/stopped" --quiet || fail "resume after SIG$signal"
  same_adapters "$work/straight" "$work/stopped"
done
expect() { # code, words, command
  local want=$1 words=$2 code=0
  shift 2
  "$ESPALIER" "$@" > out.txt 2> err.txt || code=$?
  [ "$code" = "$want" ] || { cat err.txt; fail "$*: exit code $code, not $want"; }
  grep -q -- "$words" err.txt || { cat err.txt; fail "$*: says nothing of '$words'"; }
}
expect 2 "already holds a run" run recipe.yaml --output "$work/straight"
expect 2 "lora_rnak" run recipe.yaml adapter.lora_rnak=4 --output "$work/x"
expect 3 "nothing.jsonl" run recipe.yaml tasks[0].data[0].path=nothing.jsonl --output "$work/x"
expect 4 "memory.limit" run recipe.yaml memory.limit=100KiB --output "$work/x"
expect 7 "log.watchdog" run recipe.yaml 'log.watchdog={loss_above: 0.01, patience: 2}' --output "$work/above"
wild=(optim.lr=100 optim.max_grad_norm=off optim.weight_decay=10 adapter.alpha=1e6 model.dtype=fp32)
expect 7 "not a number" run recipe.yaml "${wild[@]}" checkpoint.every=1 --output "$work/wild"
# the last checkpoint was made before the step that failed: its values are finite and a resume fails at the same step
first=$(cat err.txt)
expect 7 "not a number" resume "$work/wild"
[ "$(cat err.txt)" = "$first" ] || fail "resumed into another failure: $(cat err.txt)"
expect 3 "no run" resume "$work/x"
[ ! -e "$work/x" ] || fail "a refused run left $work/x behind"
echo "signals and refusals: as they should be"
