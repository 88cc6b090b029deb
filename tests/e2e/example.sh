#!/usr/bin/env bash
# The example program learns four answers, saves, and gives them again from the saved adapter.
# Mutation seen caught: one more, much too large update between training and esp_session_save.
. "$(dirname "$0")/../script.sh"
[ "$(wc -l < "$ESP_SOURCE_DIR/examples/finetune.c")" -lt 100 ] || fail "the example has grown to 100 lines"
"$MAKE_TINY" "$work"
"$EXAMPLE" "$work/model" "$work/adapter" || fail "the example"
for file in adapter_config.json adapter_model.safetensors; do
  [ -s "$work/adapter/$file" ] || fail "no $file"
done
