#!/usr/bin/env bash
# Two experts of lae: training is that of one; both adapters are saved, and `eval --ensemble` on them has the scores of the
# run's last row, which are not those of either alone; resumed, the run has the bytes of the undisturbed one.
# Mutation seen caught: `save_second` (loop.c) without asking for the other expert.
. "$(dirname "$0")/../script.sh"
cp -r "$ESP_SOURCE_DIR/recipes" "$work/recipes"
cd "$work/recipes/continual"
short=(train.max_steps=6 train.micro_batch_size=4 optim.lr=1e-2 continual.lae.decay=0.8 'continual.order=[animal, number, mood]')
for i in 0 1 2 3; do short+=("eval.sets[$i].limit=40"); done
short+=('eval.sets[2].metric=perplexity' 'eval.sets[1].metric=rouge_l' 'eval.sets[1].max_new_tokens=4')
both=continual.lae.ensemble=true
"$ESPALIER" run lae.yaml "${short[@]}" -q --output "$work/one" || fail "the run of one"
"$ESPALIER" run lae.yaml "${short[@]}" $both -q --output "$work/two" || fail "the run of two"
for task in animal number mood; do
  cmp "$work/one/adapters/$task/adapter_model.safetensors" "$work/two/adapters/$task/adapter_model.safetensors" || fail "training differs"
done
[ ! -e "$work/one/fast" ] || fail "one expert has two adapters"
cmp -s "$work/two/adapters/mood/adapter_model.safetensors" "$work/two/fast/mood/adapter_model.safetensors" && fail "both experts are one"
cmp "$work/two/adapters/animal/adapter_model.safetensors" "$work/two/fast/animal/adapter_model.safetensors" || fail "two in the first task"

scores() { # of the last row of a run, or of `eval`
  sed -n 's/.*"score": *\([^,}]*\).*/\1/p'
}
row() { tail -4 "$work/$1/metrics.jsonl" | scores; }
"$ESPALIER" eval lae.yaml "${short[@]}" --json -a "$work/two/adapters/mood" -e "$work/two/fast/mood" | scores > ensemble.txt
"$ESPALIER" eval lae.yaml "${short[@]}" --json -a "$work/two/adapters/mood" | scores > slow.txt
"$ESPALIER" eval lae.yaml "${short[@]}" --json -a "$work/two/fast/mood" | scores > fast.txt
[ "$(wc -l < ensemble.txt)" = 4 ] || fail "no scores"
close() { # two lists of numbers: equal to six digits
  paste "$1" "$2" | awk '{ d = $1 - $2; if (d < 0) d = -d; if (d > 1e-6 * ($1 > 1 ? $1 : 1)) bad = 1 } END { exit bad || NR != 4 }'
}
row two > two.txt
row one > one.txt
close two.txt ensemble.txt || { paste two.txt ensemble.txt; fail "eval --ensemble is not the run's last row"; }
close one.txt slow.txt || { paste one.txt slow.txt; fail "eval is not the last row of one expert"; }
close ensemble.txt slow.txt && fail "the ensemble is the slow expert"
close ensemble.txt fast.txt && fail "the ensemble is the fast expert"

"$ESPALIER" run lae.yaml "${short[@]}" $both -q --stop-after 14 --output "$work/cut" 2> /dev/null && fail "did not stop"
"$ESPALIER" resume "$work/cut" -q || fail "resumed"
for file in matrix.json adapters/mood/adapter_model.safetensors fast/mood/adapter_model.safetensors; do
  cmp "$work/two/$file" "$work/cut/$file" || fail "resumed: $file"
done
plan=$(sed -n 's/.*"planned_memory_peak": \([0-9]*\).*/\1/p' "$work/two/result.json")
peak=$(sed -n 's/.*"memory_peak": \([0-9]*\).*/\1/p' "$work/two/result.json" | head -1)
[ "$peak" -le $((plan + plan / 50)) ] || fail "planned $plan, held $peak"
echo "ensemble: slow $(tr '\n' ' ' < slow.txt)fast $(tr '\n' ' ' < fast.txt)both $(tr '\n' ' ' < ensemble.txt)"
