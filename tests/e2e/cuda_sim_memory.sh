#!/usr/bin/env bash
# The plan's device bytes are the bytes of the run, whatever the recipe, but for what is bounded from above (the scratch of
# attention, which cuDNN or the own kernels may do; descriptions of sequences for each bucket of counts). A device that is too small is
# refused by the plan, before anything is written.
# Mutation seen caught: packed operands allocated twice as large (esp_cuda_pack).
. "$(dirname "$0")/cuda_sim.inc"

bound=$((64 << 10))
n=0
for how in model.dtype=bf16 model.dtype=fp32 memory.activation_checkpointing=full memory.offload_base=true \
  "train.micro_batch_size=4 data.sequence_len=48" "adapter={type: full}"; do
  n=$((n + 1))
  words=()
  case $how in adapter*) words=("$how") ;; *) read -ra words <<< "$how" ;; esac
  go "run$n" cuda "${words[@]}"
  measured=$(value "run$n/result.json" device_peak) planned=$(value "run$n/result.json" planned_device_peak)
  [ -n "$measured" ] && [ $((planned - measured)) -le "$bound" ] && [ $((measured - planned)) -le "$bound" ] ||
    fail "$how: planned $planned bytes on the device, measured $measured"
  "$ESPALIER" plan recipe.yaml --device cuda "${short[@]}" "${words[@]}" --json > plan.json || fail "plan $how"
  [ "$(value plan.json device_peak_bytes)" = "$planned" ] || fail "$how: plan says $(cat plan.json), the run planned $planned"
  echo "$how: $measured bytes on the device, $planned planned"
done

# too small a device: plan answers 4 and so does run, which leaves nothing behind
export SIMCUDA_MEMORY=1000000
for verb in plan run; do
  code=0
  out=()
  [ $verb = plan ] || out=(--output "$work/small")
  "$ESPALIER" $verb recipe.yaml --device cuda "${out[@]}" > log.txt 2> err.txt || code=$?
  [ $code = 4 ] || { cat log.txt err.txt >&2; fail "$verb on a device of 1 MB: exit code $code, not 4"; }
done
[ "$(wc -l < err.txt)" = 1 ] || { cat err.txt >&2; fail "not one line"; }
grep -q "of the device" err.txt || { cat err.txt >&2; fail "the refusal does not name the device"; }
[ ! -e "$work/small" ] || fail "a refused run left a folder"
echo "too small a device: $(cat err.txt)"
