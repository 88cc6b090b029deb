#!/usr/bin/env bash
# Ranks that move in a run: a run that was stopped before, between and after the moves ends with the bytes of the
# undisturbed one, adapter, optimizer state, statistics and ranks; the plan covers the peak; the ranks at the end are
# what the kind promises.
# Mutation seen caught: `fill_new` (triplets_rank.c) numbering new ranks from zero again after a resume.
. "$(dirname "$0")/../script.sh"
"$MAKE_TINY" "$work"
cd "$work"
common="adapter.tinit=2 adapter.tfinal=4 adapter.interval=2 adapter.importance_beta1=0.5
  adapter.importance_beta2=0.5 adapter.target=all-linear train.max_steps=14 optim.lr=5e-3 checkpoint.every=1000"
same() { # a, b
  local f
  for f in "$1"/checkpoints/*-task2/*; do
    case $f in */state.json | */manifest.json) continue ;; esac
    cmp "$f" "$2/checkpoints/$(basename "$(dirname "$f")")/$(basename "$f")" || fail "$2: $(basename "$f") differs"
  done
  same_adapters "$1" "$2"
}
kind() { # name, settings
  local name=$1 at
  shift
  "$ESPALIER" run recipe.yaml --quiet --output "$work/$name" $common adapter.type="$name" "$@" || fail "$name"
  for at in 3 8 11 20; do
    rm -rf "$work/stopped"
    "$ESPALIER" run recipe.yaml --quiet --output "$work/stopped" --stop-after $at $common adapter.type="$name" "$@" \
      > /dev/null 2>&1 && fail "$name did not stop after step $at"
    "$ESPALIER" resume "$work/stopped" --quiet || fail "$name: resume after step $at"
    same "$work/$name" "$work/stopped"
  done
}
last() { # run, key
  grep "\"$2\"" "$work/$1/metrics.jsonl" | tail -1 | sed "s/.*\"$2\":\([0-9]*\).*/\1/"
}
bytes() { # run, key
  sed -n "s/.*\"$2\": \([0-9]*\).*/\1/p" "$work/$1/result.json"
}
for name in adalora increlora elalora dyrank; do
  case $name in
  adalora) kind $name adapter.r=4 adapter.target_r=2 ;;
  increlora) kind $name adapter.r=1 adapter.target_r=3 ;;
  elalora) kind $name adapter.r=3 adapter.elastic_share=0.3 ;;
  dyrank) kind $name adapter.r=4 adapter.threshold=3 adapter.alpha=64 ;;
  esac
  kept=$(last $name ranks_kept) budget=$(last $name rank_budget)
  if [ $name = dyrank ]; then
    [ "$kept" -lt "$budget" ] || fail "dyrank: all of $budget ranks are left"
  else
    [ "$kept" = "$budget" ] || fail "$name: $kept ranks at the end, the budget is $budget"
  fi
  peak=$(bytes $name memory_peak) planned=$(bytes $name planned_memory_peak)
  [ "$peak" -le $((planned + planned / 50)) ] || fail "$name: peak of $peak bytes, $planned were planned"
  echo "$name: $kept ranks of $budget, peak $peak of $planned bytes"
done
