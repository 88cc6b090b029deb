/* Runs a fuzz target once over each file of a corpus directory, in builds without libFuzzer. A case that once crashed
 * stays in the corpus and is thereby a test for ever. An empty or missing corpus fails. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay(const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) return 0;
  uint8_t *data = NULL;
  size_t n = 0, cap = 0;
  for (;;) {
    if (n == cap) {
      cap = cap ? cap * 2 : 4096;
      uint8_t *grown = realloc(data, cap);
      if (!grown) break;
      data = grown;
    }
    size_t got = fread(data + n, 1, cap - n, f);
    if (got == 0) break;
    n += got;
  }
  int ok = data && !ferror(f); /* a directory opens but does not read */
  fclose(f);
  if (ok) {
    printf("%s\n", path); /* the last line before a crash names the case */
    fflush(stdout);
    LLVMFuzzerTestOneInput(data, n);
  }
  free(data);
  return ok;
}

int main(int argc, char **argv) {
  int count = 0;
  for (int i = 1; i < argc; i++) {
    DIR *d = opendir(argv[i]);
    if (!d) {
      fprintf(stderr, "%s: no such corpus\n", argv[i]);
      return 1;
    }
    for (struct dirent *e; (e = readdir(d));) {
      char path[4096];
      if (e->d_name[0] == '.') continue;
      snprintf(path, sizeof path, "%s/%s", argv[i], e->d_name);
      count += replay(path);
    }
    closedir(d);
  }
  printf("%d cases\n", count);
  return count > 0 ? 0 : 1;
}
