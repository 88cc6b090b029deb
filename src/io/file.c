#include "io/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/mem.h"
#include "io/atomic.h"

static esp_status fail_errno(const char *path, const char *what) {
  return esp_fail(ESP_ERR_DATA, "%s: %s: %s", path, what, strerror(errno));
}

/* A regular file opened for reading, with its size. */
static esp_status open_regular(const char *path, int *fd, size_t *size) {
  struct stat info;
  *fd = open(path, O_RDONLY | O_CLOEXEC);
  if (*fd < 0) return fail_errno(path, "cannot open");
  if (fstat(*fd, &info) == 0 && S_ISREG(info.st_mode)) {
    *size = (size_t)info.st_size;
    return ESP_OK;
  }
  close(*fd);
  *fd = -1;
  return esp_fail(ESP_ERR_DATA, "%s: not a regular file", path);
}

/* Reads to the end of the stream, whatever its kind (a pipe has no size). */
esp_status esp_file_read(const char *path, char **data, size_t *n) {
  esp_status st = ESP_OK;
  struct stat info;
  char *buf = NULL;
  size_t cap = 0, len = 0;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  *data = NULL;
  if (fd < 0) return fail_errno(path, "cannot open");
  if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode)) cap = (size_t)info.st_size;
  cap += 2; /* the zero, and one to see the end without growing */
  if (!(buf = esp_mem_alloc(ESP_MEM_DATA, cap))) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (;;) {
    if (len + 1 >= cap) {
      char *grown = esp_mem_realloc(ESP_MEM_DATA, buf, cap * 2);
      if (!grown) {
        st = ESP_ERR_MEMORY;
        goto out;
      }
      buf = grown;
      cap *= 2;
    }
    ssize_t got = read(fd, buf + len, cap - 1 - len);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      st = fail_errno(path, "cannot read");
      goto out;
    }
    if (got == 0) break;
    len += (size_t)got;
  }
  buf[len] = 0;
  *data = buf;
  if (n) *n = len;
  buf = NULL;
out:
  esp_mem_free(buf);
  close(fd);
  return st;
}

esp_status esp_file_write_atomic(const char *path, const void *data, size_t n) {
  esp_atomic_file f;
  ESP_TRY(esp_atomic_open(&f, path));
  esp_status st = esp_atomic_write(&f, data, n, 0);
  if (st != ESP_OK) {
    esp_atomic_abort(&f);
    return st;
  }
  return esp_atomic_commit(&f);
}

esp_status esp_file_map(const char *path, esp_map_file *out) {
  int fd;
  size_t size = 0;
  *out = (esp_map_file){"", 0};
  ESP_TRY(open_regular(path, &fd, &size));
  esp_status st = ESP_OK;
  if (size > 0) {
    void *p = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED)
      st = fail_errno(path, "cannot map");
    else
      *out = (esp_map_file){p, size};
  }
  close(fd);
  return st;
}

void esp_file_unmap(esp_map_file *m) {
  if (m->size > 0) munmap((void *)m->data, m->size);
  *m = (esp_map_file){"", 0};
}

bool esp_file_exists(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

bool esp_dir_exists(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

esp_status esp_mkdirs(const char *path) {
  char part[PATH_MAX];
  size_t n = strlen(path);
  if (n == 0 || n >= sizeof part) return esp_fail(ESP_ERR_DATA, "%s: not a usable directory name", path);
  memcpy(part, path, n + 1);
  for (char *p = part + 1;; p++) {
    if (*p != '/' && *p) continue;
    char kept = *p;
    *p = 0;
    if (mkdir(part, 0777) != 0 && !esp_dir_exists(part)) return fail_errno(part, "cannot make the directory");
    *p = kept;
    if (!kept) return ESP_OK;
  }
}

/* Depth first; a symbolic link is removed, never followed. */
static int remove_at(int parent, const char *name) {
  if (unlinkat(parent, name, 0) == 0 || errno == ENOENT) return 0;
  if (errno != EISDIR && errno != EPERM) return -1;
  int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return -1;
  DIR *d = fdopendir(fd);
  if (!d) {
    close(fd);
    return -1;
  }
  int failed = 0;
  for (struct dirent *e; (e = readdir(d));)
    if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0 && remove_at(fd, e->d_name) != 0) failed = errno;
  closedir(d);
  if (failed) {
    errno = failed;
    return -1;
  }
  return unlinkat(parent, name, AT_REMOVEDIR);
}

esp_status esp_remove_tree(const char *path) {
  return remove_at(AT_FDCWD, path) == 0 ? ESP_OK : fail_errno(path, "cannot remove");
}

esp_status esp_copy_file(const char *src, const char *dst) {
  esp_map_file m;
  ESP_TRY(esp_file_map(src, &m));
  esp_status st = esp_file_write_atomic(dst, m.data, m.size);
  esp_file_unmap(&m);
  return st;
}

esp_status esp_fsync_dir(const char *path) {
  int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return fail_errno(path, "cannot open the directory");
  /* EINVAL: a file system without directory sync */
  esp_status st = fsync(fd) == 0 || errno == EINVAL ? ESP_OK : fail_errno(path, "cannot sync the directory");
  close(fd);
  return st;
}

int64_t esp_disk_free(const char *path) {
  struct statvfs info;
  if (statvfs(path, &info) != 0) return -1;
  return (int64_t)info.f_bavail * (int64_t)info.f_frsize;
}

void esp_hash_hex(const void *data, size_t n, char out[33]) {
  XXH128_hash_t h = XXH3_128bits(data, n);
  snprintf(out, 33, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
}

esp_status esp_file_hash(const char *path, char out[33]) {
  esp_map_file m;
  ESP_TRY(esp_file_map(path, &m));
  esp_hash_hex(m.data, m.size, out);
  esp_file_unmap(&m);
  return ESP_OK;
}

char *esp_path_join(char *out, size_t n, const char *a, const char *b) {
  size_t la = strlen(a);
  while (la > 1 && a[la - 1] == '/') la--;
  while (*b == '/') b++;
  const char *slash = la == 0 || a[la - 1] == '/' ? "" : "/";
  snprintf(out, n, "%.*s%s%s", (int)la, a, slash, b);
  return out;
}
