#!/usr/bin/env bash
# The example program learns four answers, saves, and gives them again from the saved adapter.
# Mutation seen caught: esp_session_save writing the adapter before training (a zero B): the second run answers nothing.
. "$(dirname "$0")/../script.sh"
[ "$(wc -l < "$ESP_SOURCE_DIR/examples/finetune.c")" -lt 100 ] || fail "the example has grown to 100 lines"
"$MAKE_TINY" "$work"
"$EXAMPLE" "$work/model" "$work/adapter" || fail "the example"
for file in adapter_config.json adapter_model.safetensors; do
  [ -s "$work/adapter/$file" ] || fail "no $file"
done
