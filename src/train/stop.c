/* stop.c: the stop flag. The only part of the interface that a signal handler may call. */
#include <signal.h>

#include "espalier/run.h"

static volatile sig_atomic_t stop_flag;

void esp_request_stop(void) {
  stop_flag = 1;
}
void esp_clear_stop(void) {
  stop_flag = 0;
}
int esp_stop_requested(void) {
  return stop_flag != 0;
}
