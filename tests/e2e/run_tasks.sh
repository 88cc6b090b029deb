#!/usr/bin/env bash
# Kinds with factors per task through the program: two tasks in sequence on one adapter. Resumed after every step, the
# run ends with the same bytes; set back to its first task, the last adapter merges into the bytes of the first one's;
# on its own second task it does not. mora_rank, which has no merge, says so and writes the nearest plain LoRA.
# Mutation seen caught: esp_task_ranks_begin that freezes later tasks only (t > task).
. "$(dirname "$0")/../script.sh"
"$MAKE_TINY" "$work"
cd "$work"
for type in o-lora incremental_rank mora_rank; do
  "$ESPALIER" run recipe.yaml --quiet adapter.type=$type optim.weight_decay=0.1 train.max_steps=3 checkpoint.every=1 checkpoint.keep=100 \
    --output "$work/again" || fail "$type: the run"
  mv again "$type"
  n=0
  for at in "$type"/checkpoints/*; do
    rm -rf again
    cp -r "$type" again # in its own place: the recipe names it
    for newer in again/checkpoints/*; do
      [[ ! $(basename "$newer") > $(basename "$at") ]] || rm -r "$newer"
    done
    [[ $at == *-task2 ]] || rm -r again/adapters/b
    [[ $at == *-task2 || $at == *0000[456] || $at == *-task1 ]] || rm -r again/adapters/a
    "$ESPALIER" resume "$work/again" --quiet || fail "$type: resume from $at"
    same_adapters "$type" again
    n=$((n + 1))
  done
  [ "$n" -ge 6 ] || fail "$type: only $n checkpoints"
  if [ "$type" = mora_rank ]; then
    ! "$ESPALIER" merge --base model --adapter "$type/adapters/b" --out merged-b --quiet 2>log || fail "$type: was merged"
    grep -q "cannot be merged: what it adds depends on the input; .export --as lora" log && [ "$(wc -l <log)" = 1 ] || fail "$type: merge: $(cat log)"
    "$ESPALIER" export --base model --adapter "$type/adapters/b" --as lora --out lora >log || fail "$type: export"
    grep -Eq "relative error: mean 0\.[0-9]+, largest 0\.[0-9]+" log || fail "$type: export: $(cat log)"
    "$ESPALIER" merge --base model --adapter lora --out merged-b --quiet || fail "$type: merge of the plain LoRA"
    rm -rf again lora merged-b
    continue
  fi
  cp -r "$type/adapters/b" back
  sed -i 's/"task": 1/"task": 0/' back/adapter_config.json
  for which in a b back; do
    from=$type/adapters/$which
    [ -d "$from" ] || from=back
    "$ESPALIER" merge --base model --adapter "$from" --dtype fp32 --out "merged-$which" --quiet || fail "$type: merge of $from"
  done
  cmp merged-back/model.safetensors merged-a/model.safetensors || fail "$type: the first task is not what it was"
  ! cmp -s merged-b/model.safetensors merged-a/model.safetensors || fail "$type: the second task changed nothing"
  rm -rf again back merged-*
done
