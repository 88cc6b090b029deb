/* dir.c: whole directories that appear at once: built under a hidden sibling's name, synced, renamed into place. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/mem.h"
#include "io/atomic.h"
#include "io/file.h"

static esp_status fail_errno(const char *path, const char *what) {
  return esp_fail(ESP_ERR_DATA, "%s: %s: %s", path, what, strerror(errno));
}

/* Without trailing slashes: siblings are named after it. */
static char *trimmed(const char *dir) {
  size_t n = strlen(dir);
  while (n > 1 && dir[n - 1] == '/') n--;
  return esp_mem_printf(ESP_MEM_HOST, "%.*s", (int)n, dir);
}

/* A process killed while it staged this directory left its sibling: remove those whose process is gone. */
static void remove_stale(const char *dir) {
  char *parent = esp_parent_dir(dir);
  const char *slash = strrchr(dir, '/'), *name = slash ? slash + 1 : dir;
  size_t n = strlen(name);
  DIR *d = parent ? opendir(parent) : NULL;
  for (struct dirent *e; d && (e = readdir(d));) {
    const char *s = e->d_name;
    if (s[0] != '.' || strncmp(s + 1, name, n) != 0) continue;
    s += 1 + n;
    if (strncmp(s, ".staged-", 8) == 0)
      s += 8;
    else if (strncmp(s, ".old-", 5) == 0)
      s += 5;
    else
      continue;
    char *end;
    long pid = strtol(s, &end, 10);
    if (*end != '-' || pid <= 0 || kill((pid_t)pid, 0) == 0 || errno != ESRCH) continue;
    char path[4096];
    esp_remove_tree(esp_path_join(path, sizeof path, parent, e->d_name)); /* best effort: it is litter */
  }
  if (d) closedir(d);
  esp_mem_free(parent);
}

esp_status esp_dir_stage(const char *dir, char *staged, size_t n) {
  esp_status st = ESP_OK;
  char *plain = trimmed(dir), *parent = plain ? esp_parent_dir(plain) : NULL;
  char *name = plain ? esp_sibling(plain, "staged") : NULL;
  if (!parent || !name) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (strlen(name) >= n) {
    st = esp_fail(ESP_ERR_DATA, "%s: the path is too long", dir);
    goto out;
  }
  ESP_GOTO(esp_mkdirs(parent));
  remove_stale(plain);
  if (mkdir(name, 0777) != 0) {
    st = fail_errno(name, "cannot make the directory");
    goto out;
  }
  memcpy(staged, name, strlen(name) + 1);
out:
  esp_mem_free(plain);
  esp_mem_free(parent);
  esp_mem_free(name);
  return st;
}

/* Every file and directory below, so that the rename never becomes durable before the contents. */
static esp_status sync_tree(const char *path) {
  esp_status st = ESP_OK;
  char sub[4096];
  DIR *d = opendir(path);
  if (!d) return fail_errno(path, "cannot open the directory");
  for (struct dirent *e; (e = readdir(d));) {
    if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
    struct stat info;
    esp_path_join(sub, sizeof sub, path, e->d_name);
    if (lstat(sub, &info) != 0) {
      st = fail_errno(sub, "cannot read");
      goto out;
    }
    if (S_ISDIR(info.st_mode)) {
      ESP_GOTO(sync_tree(sub));
    } else if (S_ISREG(info.st_mode)) {
      int fd = open(sub, O_RDONLY | O_CLOEXEC);
      if (fd < 0 || fsync(fd) != 0) st = fail_errno(sub, "cannot sync");
      if (fd >= 0) close(fd);
      if (st != ESP_OK) goto out;
    }
  }
  st = esp_fsync_dir(path);
out:
  closedir(d);
  return st;
}

esp_status esp_dir_commit(const char *staged, const char *dir) {
  esp_status st = ESP_OK;
  char *plain = trimmed(dir), *parent = plain ? esp_parent_dir(plain) : NULL;
  char *old = plain ? esp_sibling(plain, "old") : NULL;
  const char *leftover = NULL;
  if (!parent || !old) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(sync_tree(staged));
  struct stat info;
  if (lstat(plain, &info) != 0) {
    if (rename(staged, plain) != 0) st = fail_errno(plain, "cannot put the new directory in place");
  } else if (renameat2(AT_FDCWD, staged, AT_FDCWD, plain, RENAME_EXCHANGE) == 0) {
    leftover = staged; /* exchanged in one step: there was no moment without the directory */
  } else if (rename(plain, old) != 0) {
    st = fail_errno(plain, "cannot move the old directory away");
  } else if (rename(staged, plain) != 0) {
    st = fail_errno(plain, "cannot put the new directory in place");
    rename(old, plain);
  } else {
    leftover = old;
  }
  if (st == ESP_OK) st = esp_fsync_dir(parent);
  if (st == ESP_OK && leftover) st = esp_remove_tree(leftover);
out:
  esp_mem_free(plain);
  esp_mem_free(parent);
  esp_mem_free(old);
  return st;
}
