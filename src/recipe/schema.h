/* schema.h: the one table behind parsing, defaults, ranges, the resolved recipe, its hash, `schema`, the docs page,
 * `init` and the error text. A row says where its value lives in the struct of its object. */
#ifndef ESP_RECIPE_SCHEMA_H
#define ESP_RECIPE_SCHEMA_H

#include <stddef.h>

#include "recipe/recipe.h"

typedef enum esp_key_type {
  ESP_T_BOOL,     /* bool */
  ESP_T_INT,      /* int64_t; `word` may stand for `word_value` */
  ESP_T_INT32,    /* int; the same */
  ESP_T_SEED,     /* uint64_t */
  ESP_T_NUMBER,   /* double; the same */
  ESP_T_SHARE,    /* double: steps, or a percentage as a share below 1 */
  ESP_T_STRING,   /* const char * */
  ESP_T_NAME,     /* const char *: letters, digits, "._-", not starting with "." */
  ESP_T_PATH,     /* const char *: relative to the recipe's folder */
  ESP_T_RUN_PATH, /* const char *: relative to checkpoint.output_dir */
  ESP_T_WORD,     /* const char *: one of words() */
  ESP_T_ENUM,     /* an int-sized enum: value = position in words (or values[]) */
  ESP_T_SWITCH,   /* bool: the position in two words */
  ESP_T_STRINGS,  /* const char *const * and int */
  ESP_T_INTS,     /* const int * and int */
  ESP_T_NUMBERS,  /* const double * and int; one number is a list of one */
  ESP_T_PATTERNS, /* esp_pattern * and int: a mapping of regular expression to number */
  ESP_T_TARGET,   /* const char *const * and int, or a regex at regex_offset */
  ESP_T_BETAS,    /* two doubles, input only */
  ESP_T_LIMIT,    /* memory.limit: bytes or a percentage */
  ESP_T_SINKS,    /* log.to: three bools */
  ESP_T_KEEP_BEST,
  ESP_T_EVAL_REFS, /* one name or a list of eval set names */
  ESP_T_VERSION,
  ESP_T_OBJECT,    /* the same struct, nested keys */
  ESP_T_OBJECTS,   /* pointer and int: a list of `object` */
  ESP_T_TASK_DATA, /* a list of sources, or a mapping with `sources` and keys of data */
  ESP_T_OVERRIDE,  /* a section again, its struct copied into the task */
  ESP_T_AFTER      /* a list of one-key mappings */
} esp_key_type;

enum {
  ESP_K_REQUIRED = 1,
  ESP_K_NOHASH = 2,      /* does not change the trained result */
  ESP_K_COMMON = 4,      /* shown by `init` */
  ESP_K_ABOVE_MIN = 8,   /* min itself is excluded */
  ESP_K_BELOW_MAX = 16,  /* max itself is excluded */
  ESP_K_INPUT_ONLY = 32, /* another spelling of other keys: no default, not rendered */
  ESP_K_REGEX = 64,      /* the text must compile */
  ESP_K_NONEMPTY = 128
};

typedef struct esp_object esp_object;
typedef struct esp_key {
  const char *name;
  esp_key_type type;
  size_t offset, count_offset, regex_offset;
  const char *def; /* as in a recipe; NULL: none */
  unsigned flags;
  double min, max;                     /* both 0: any */
  const char *const *words;            /* NULL-terminated */
  const char *const *(*names)(int *n); /* or from a registry */
  const int *values;                   /* of words; NULL: 0, 1, 2, ... */
  const char *word;                    /* a word that stands for a number */
  double word_value;
  const esp_object *object;
  const char *aliases; /* accepted spellings of other trainers, separated by blanks */
  const char *of;      /* adapter kinds that read it, separated by blanks; NULL: all */
  const char *help;
} esp_key;

struct esp_object {
  const char *name, *help;
  const esp_key *keys;
  int n;
  size_t size; /* of list elements */
};

extern const esp_object esp_schema_root;
/* Sections that a task may set again: where they live in the recipe and in the task. */
typedef struct esp_section {
  const char *name;
  size_t recipe_offset, task_offset, size;
} esp_section;
extern const esp_section esp_schema_sections[];
extern const int esp_schema_n_sections;
const esp_section *esp_schema_section(const char *name); /* NULL: cannot be set per task */

const esp_key *esp_schema_find(const esp_object *o, const char *name); /* by name or alias */
const char *const *esp_key_words(const esp_key *k, int *n);            /* NULL: not an enumeration */
bool esp_key_has_alias(const esp_key *k, const char *name);
/* In a task: is this key's value inside the section's struct (else it holds for the whole run only)? */
bool esp_key_per_task(const esp_key *k, const esp_section *s);

#endif
