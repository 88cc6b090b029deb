#!/usr/bin/env bash
# Two ranks with a device each in the simulation: gradients go through NCCL's stand-in, between processes. The losses are
# those of one rank that takes the same rows, two runs have the same bytes, and where nothing is replayed too.
# Mutation seen caught: the last rank left out of the sum in dist/cuda/nccl.c.
. "$(dirname "$0")/cuda_sim.inc"
command -v mpirun > /dev/null || { echo "skipped: no mpirun"; exit 77; }
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 SIMCUDA_DEVICES=2
wide=(train.max_steps=4 model.dtype=fp32 "eval.sets[0].limit=2" "eval.sets[1].limit=2" train.micro_batch_size=1)
ranks() { # folder, number of ranks, accumulation, then environment
  local out=$1 n=$2 accumulate=$3
  shift 3
  (export "$@" _=; mpirun --oversubscribe --bind-to none -n "$n" "$ESPALIER" run recipe.yaml --quiet --device cuda "${wide[@]}" \
    train.gradient_accumulation_steps="$accumulate" --output "$work/$out" > log.txt 2>&1) ||
    { cat log.txt >&2; fail "$n ranks: exit code $?"; }
}
ranks two 2 1
ranks again 2 1
same_bytes two again
ranks direct 2 1 ESPALIER_CUDA_GRAPHS=0
same_bytes two direct
ranks one 1 2
close_losses one two 2e-6
echo "two ranks on simulated devices: as one rank, and the same bytes again"
