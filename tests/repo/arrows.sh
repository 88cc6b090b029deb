#!/bin/sh
# Holds the arrows of docs/design.md: a room includes only itself and the rooms listed for it. The public headers
# (espalier/) may be included by core (status.h), by api and by the program, which includes nothing else.
# Mutation it caught: an '#include "train/loop.h"' put into src/model/decoder.c.
set -eu
cd "$(dirname "$0")/../.."
allowed() {
  case $1 in
  core) echo core ;;
  io) echo core io ;;
  backend) echo core backend ;;
  text) echo core io text ;;
  model) echo core io backend model ;;
  adapters) echo core io backend model adapters ;;
  optim) echo core io backend optim ;;
  dist) echo core backend dist ;;
  tasks) echo core io backend text model adapters optim dist tasks ;;
  recipe) echo core io backend text model adapters optim dist tasks recipe ;;
  train) echo core io backend text model adapters optim dist tasks recipe train ;;
  eval) echo core io backend text model adapters tasks recipe eval ;;
  merge) echo core io backend model adapters merge ;;
  api) echo core io backend text model adapters optim dist tasks recipe train eval merge api ;;
  cli) echo cli ;;
  esac
}
bad=0
for dir in src/* adapters optim dist; do
  room=$(basename "$dir")
  ok=" $(allowed "$room") "
  [ "$ok" = "  " ] && { echo "arrows: room '$room' is not in the design"; bad=1; continue; }
  for line in $(grep -rhoE '^#include "[a-z_]+/' "$dir" --include='*.[ch]' --include='*.cu' --include='*.cuh' | sed -E 's/.*"([a-z_]+)\//\1/' | sort -u); do
    case "$line" in
    espalier) case $room in core | api | cli | train | tasks | eval | merge) ;; *) echo "arrows: $dir includes espalier/"; bad=1 ;; esac ;;
    *) case "$ok" in *" $line "*) ;; *)
        echo "arrows: $dir must not include $line/:"
        grep -rnE "^#include \"$line/" "$dir" --include='*.[ch]'
        bad=1 ;;
      esac ;;
    esac
  done
done
[ $bad = 0 ] && echo "arrows: every include points down"
exit $bad
