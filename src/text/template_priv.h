/* template_priv.h: what the dataset needs to know about the built-in templates. */
#ifndef ESP_TEXT_TEMPLATE_PRIV_H
#define ESP_TEXT_TEMPLATE_PRIV_H

#include "text/template.h"

/* github.com/tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT; the line break behind "### Response:" as in alpaca-lora
 * and all that followed it. */
#define ESP_ALPACA_INTRO                                                                                               \
  "Below is an instruction that describes a task. Write a response that appropriately completes the request."
#define ESP_ALPACA_INTRO_INPUT                                                                                         \
  "Below is an instruction that describes a task, paired with an input that provides further context. Write a "        \
  "response that appropriately completes the request."

/* The control tokens a template prints, NULL-terminated, the terminator first; NULL: unknown template. */
const char *const *esp_template_tokens(const char *name);

#endif
