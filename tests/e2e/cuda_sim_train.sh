#!/usr/bin/env bash
# A recipe through the whole CUDA plug-in in the simulation: equals the cpu run to rounding, two runs and every schedule
# of the simulation give the same bytes, so do resume, recomputation and streamed weights; generation says the same.
# Mutations seen caught: no wait for a staged copy (esp_cuda_stage_wait), no wait of a copy for what was issued before it
# (esp_cuda_stage); both only under one of the schedules.
. "$(dirname "$0")/cuda_sim.inc"

# fp32 with dropout: the masks are drawn by counter, so both backends drop the same elements
go cpu32 cpu model.dtype=fp32
go gpu32 cuda model.dtype=fp32
close_losses cpu32 gpu32 1e-5
# bf16: 8 bits of mantissa at every activation, rounded at other places where the backends fuse other things
go cpu16 cpu
go gpu16 cuda
close_losses cpu16 gpu16 2e-3

go again cuda
same_bytes gpu16 again
for schedule in SIMCUDA_ORDER=reverse SIMCUDA_ORDER=shuffle:7 SIMCUDA_DEFER=lazy SIMCUDA_DEFER=hasty; do
  (export "$schedule" && go "${schedule/=/_}" cuda)
  same_bytes gpu16 "${schedule/=/_}"
  echo "$schedule: the same bytes"
done
go recomputed cuda memory.activation_checkpointing=full
same_bytes gpu16 recomputed
go streamed cuda memory.offload_base=true
same_bytes gpu16 streamed
# copies of weights as late as the waits allow (they must be waited for) and as early (what they overwrite must be done)
for defer in lazy hasty; do
  (export SIMCUDA_DEFER=$defer SIMCUDA_ORDER=reverse && go streamed_$defer cuda memory.offload_base=true)
  same_bytes gpu16 streamed_$defer
done

code=0
"$ESPALIER" run recipe.yaml --quiet --device cuda "${short[@]}" --stop-after 4 --output "$work/cut" > log.txt 2>&1 || code=$?
[ $code = 6 ] || { cat log.txt >&2; fail "--stop-after: exit code $code, not 6"; }
"$ESPALIER" resume "$work/cut" --quiet --device cuda > log.txt 2>&1 || { cat log.txt >&2; fail "resume: exit code $?"; }
same_bytes gpu16 cut

say() { # device, then more options
  local device=$1
  shift
  "$ESPALIER" generate -m model -a gpu32/adapters/b --device "$device" --set model.dtype=fp32 -p 'item 1 is ' -p 'x' -n 8 "$@"
}
for how in "" "--temperature 1.2 --top-p 0.9 --seed 5"; do
  say cpu $how > one.txt || fail "generate on cpu"
  say cuda $how > two.txt || fail "generate on cuda"
  cmp one.txt two.txt || fail "generation differs ($how)"
done
echo "training in the simulation: as on the cpu, and the same bytes on every way"
