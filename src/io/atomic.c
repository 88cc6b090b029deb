#include "io/atomic.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/mem.h"
#include "io/file.h"

#define WRITE_PIECE ((size_t)1 << 30) /* below the 2 GiB limit of one write call */

char *esp_parent_dir(const char *path) {
  const char *slash = strrchr(path, '/');
  if (!slash) return esp_mem_strdup(ESP_MEM_HOST, ".");
  if (slash == path) return esp_mem_strdup(ESP_MEM_HOST, "/");
  return esp_mem_printf(ESP_MEM_HOST, "%.*s", (int)(slash - path), path);
}

char *esp_sibling(const char *path, const char *tag) {
  static _Atomic unsigned counter;
  unsigned n = atomic_fetch_add(&counter, 1);
  const char *slash = strrchr(path, '/');
  int lead = slash ? (int)(slash + 1 - path) : 0;
  return esp_mem_printf(ESP_MEM_HOST, "%.*s.%s.%s-%ld-%u", lead, path, path + lead, tag, (long)getpid(), n);
}

static void forget(esp_atomic_file *f) {
  if (f->fd >= 0) close(f->fd);
  esp_mem_free(f->path);
  esp_mem_free(f->temp);
  *f = (esp_atomic_file){.fd = -1};
}

esp_status esp_atomic_open(esp_atomic_file *f, const char *path) {
  esp_status st = ESP_OK;
  char *dir = esp_parent_dir(path);
  *f = (esp_atomic_file){.fd = -1};
  f->path = esp_mem_strdup(ESP_MEM_HOST, path);
  f->temp = esp_sibling(path, "tmp");
  if (!dir || !f->path || !f->temp) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  f->fd = open(dir, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666);
  if (f->fd < 0) { /* not on this file system */
    f->fd = open(f->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    f->named = f->fd >= 0;
  }
  if (f->fd < 0) st = esp_fail(ESP_ERR_DATA, "%s: cannot write: %s", path, strerror(errno));
out:
  esp_mem_free(dir);
  if (st != ESP_OK) forget(f);
  return st;
}

esp_status esp_atomic_write(esp_atomic_file *f, const void *data, size_t n, int64_t offset) {
  const char *p = data;
  while (n > 0) {
    ssize_t got = pwrite(f->fd, p, n < WRITE_PIECE ? n : WRITE_PIECE, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0)
      return esp_fail(ESP_ERR_DATA, "%s: cannot write %zu bytes: %s", f->path, n,
                      got < 0 ? strerror(errno) : "no space");
    p += got;
    n -= (size_t)got;
    offset += got;
  }
  return ESP_OK;
}

esp_status esp_atomic_reserve(esp_atomic_file *f, int64_t bytes) {
  while (bytes > 0 && fallocate(f->fd, 0, 0, bytes) != 0) {
    if (errno == EINTR) continue;
    if (errno == ENOSPC || errno == EFBIG || errno == EDQUOT)
      return esp_fail(ESP_ERR_DATA, "%s: cannot write %lld bytes: %s", f->path, (long long)bytes, strerror(errno));
    break; /* this file system cannot reserve: the writes will tell */
  }
  return ESP_OK;
}

esp_status esp_atomic_commit(esp_atomic_file *f) {
  esp_status st = ESP_OK;
  char *dir = esp_parent_dir(f->path);
  if (!dir) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (fsync(f->fd) != 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: cannot write: %s", f->path, strerror(errno));
    goto out;
  }
  if (!f->named) {
    char proc[64];
    snprintf(proc, sizeof proc, "/proc/self/fd/%d", f->fd);
    if (linkat(AT_FDCWD, proc, AT_FDCWD, f->temp, AT_SYMLINK_FOLLOW) != 0) {
      st = esp_fail(ESP_ERR_DATA, "%s: cannot name the new file: %s", f->path, strerror(errno));
      goto out;
    }
    f->named = true;
  }
  int fd = f->fd;
  f->fd = -1;
  if (close(fd) != 0 && errno != EINTR) { /* some network file systems report the full disk here */
    st = esp_fail(ESP_ERR_DATA, "%s: cannot write: %s", f->path, strerror(errno));
    goto out;
  }
  if (rename(f->temp, f->path) != 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: cannot replace: %s", f->path, strerror(errno));
    goto out;
  }
  f->named = false;
  ESP_GOTO(esp_fsync_dir(dir));
out:
  esp_mem_free(dir);
  if (f->named) unlink(f->temp);
  forget(f);
  return st;
}

void esp_atomic_abort(esp_atomic_file *f) {
  if (f->named) unlink(f->temp);
  forget(f);
}
