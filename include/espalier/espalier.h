/* espalier.h: the whole public interface. A C program does with it what the command line does: the command line uses
 * nothing else.
 *
 *   job.h      a recipe: check, plan, run, resume, evaluate
 *   session.h  stepping by hand: load, attach, step, save, generate
 *   tools.h    merge, extract, export, inspect, matrix, report, doctor
 *   run.h      events, stopping, plans
 *   status.h   the result of every call
 *
 * Objects are not shared between threads; different objects may be used by different threads one at a time, since they
 * share one thread pool. Nothing here prints, exits or installs a signal handler.
 */
#ifndef ESPALIER_ESPALIER_H
#define ESPALIER_ESPALIER_H

#include "espalier/job.h"
#include "espalier/run.h"
#include "espalier/session.h"
#include "espalier/status.h"
#include "espalier/tools.h"

#ifdef __cplusplus
extern "C" {
#endif

ESP_API const char *esp_version(void);
/* Frees what this interface returned for the caller to own. NULL is allowed. */
ESP_API void esp_free(void *ptr);
/* 0: ESPALIER_THREADS, else the processors this process may use. */
ESP_API esp_status esp_set_threads(int n);
/* Lines about counted facts; level 0 debug, 1 info, 2 notice. NULL: none (the default). */
ESP_API void esp_set_log(void (*fn)(void *ctx, int level, const char *line), void *ctx);

#ifdef __cplusplus
}
#endif
#endif
