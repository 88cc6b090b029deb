#!/usr/bin/env bash
# First values of LoRA from data or from a quantiser, and LoRA-FA, through the program: stopped and resumed, a run ends
# with the bytes of the undisturbed one, although the pass over data is made again; the plan covers the peak; what was
# saved merges on the base as it was and gives what was trained.
# Mutation seen caught: give_way (lora_init.c) that leaves the base as it was fails "lora_ga: the first loss".
. "$(dirname "$0")/../script.sh"
"$MAKE_TINY" "$work"
cd "$work"
common="adapter.type=lora adapter.r=4 adapter.alpha=8 adapter.target=all-linear train.max_steps=4 optim.lr=5e-3 checkpoint.every=1000"
bytes() { # run, key
  sed -n "s/.*\"$2\": \([0-9]*\).*/\1/p" "$work/$1/result.json"
}
start() { # name, settings
  local name=$1 at
  shift
  "$ESPALIER" run recipe.yaml --quiet --output "$work/$name" $common "$@" || fail "$name"
  for at in 2 6; do
    rm -rf "$work/stopped"
    "$ESPALIER" run recipe.yaml --quiet --output "$work/stopped" --stop-after $at $common "$@" > /dev/null 2>&1 &&
      fail "$name did not stop after step $at"
    "$ESPALIER" resume "$work/stopped" --quiet || fail "$name: resume after step $at"
    same_adapters "$name" stopped
  done
  peak=$(bytes "$name" memory_peak) planned=$(bytes "$name" planned_memory_peak)
  [ "$peak" -le $((planned + planned / 50)) ] || fail "$name: peak of $peak bytes, $planned were planned"
  "$ESPALIER" merge -b model -a "$name/adapters/b" -o "$work/merged" --dtype fp32 --verify 8 --quiet > log 2>&1 ||
    fail "$name: merge: $(cat log)"
  rm -rf "$work/merged"
  first=$(grep -m1 '"loss"' "$name/metrics.jsonl" | sed 's/.*"loss":\([0-9.]*\).*/\1/')
  [ -n "${base:=$first}" ] && awk "BEGIN {d = $first / $base - 1; exit !(d * d < $far * $far)}" ||
    fail "$name: the first loss is $first, that of the base $base"
  echo "$name: first loss $first, peak $peak of $planned bytes"
}
far=1e-3
start plain
start eva adapter.init=eva adapter.init_batches=3
start eva_tasks adapter.init=eva adapter.init_batches=3 adapter.eva_rho=3 continual.policy=new_per_task
start corda adapter.init=corda adapter.corda_method=kpm adapter.init_batches=3
start lora_ga adapter.init=lora_ga adapter.init_batches=3
start pissa adapter.init=pissa
start lora_fa adapter.lora_fa=true
far=2e-2 # the base is another
start loftq adapter.init=loftq adapter.loftq_iter=2
