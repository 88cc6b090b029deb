#!/bin/sh
# The program and the library need nothing of CUDA: what does is in the plug-in, which needs no driver library to be
# opened and exports one symbol. Arguments: program, library, plug-in ("" where it is not built).
# Mutation it caught: a call of cudaGetDeviceCount in src/api/doctor.c.
set -eu
bad=0
for file in "$1" "$2"; do
  if nm -D --undefined-only "$file" | grep -iE ' (cu[A-Z]|cuda|cublas|cudnn|nccl|nvrtc)' ||
    objdump -p "$file" | grep -iE 'NEEDED.*(cuda|cublas|cudnn|nccl)'; then
    echo "cuda_symbols: $file needs CUDA"
    bad=1
  fi
done
if [ -n "${3:-}" ]; then
  if objdump -p "$3" | grep -E 'NEEDED.*(libcuda\.|libcudnn|libnccl)'; then
    echo "cuda_symbols: the plug-in is linked to what it should open by itself"
    bad=1
  fi
  exported=$(nm -D --defined-only "$3" | awk '$2 == "T" {print $3}' | tr '\n' ' ')
  [ "$exported" = "esp_cuda_plugin " ] || { echo "cuda_symbols: the plug-in exports: $exported"; bad=1; }
fi
[ $bad = 0 ] && echo "cuda_symbols: CUDA is in the plug-in alone"
exit $bad
