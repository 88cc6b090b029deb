/* status.h: the result of every call that can fail, and the message behind it.
 *
 * A function that can fail returns esp_status. The value of a failure is also the exit code of the
 * command line. The message, with its context (file, line, tensor name), sits in a thread-local
 * buffer until the next failure on the same thread; the library itself never prints and never exits.
 */
#ifndef ESPALIER_STATUS_H
#define ESPALIER_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define ESP_API __attribute__((visibility("default")))
#define ESP_PRINTF(f, a) __attribute__((format(printf, f, a)))
#define ESP_MUST_CHECK __attribute__((warn_unused_result))
#else
#define ESP_API
#define ESP_PRINTF(f, a)
#define ESP_MUST_CHECK
#endif

typedef enum esp_status {
  ESP_OK = 0,
  ESP_ERR_INTERNAL = 1,    /* a bug of this program, or an operating system call that failed */
  ESP_ERR_RECIPE = 2,      /* recipe or command line */
  ESP_ERR_DATA = 3,        /* data, tokenizer, model or adapter files */
  ESP_ERR_MEMORY = 4,      /* does not fit, or an allocation failed */
  ESP_ERR_DEVICE = 5,      /* device or communication */
  ESP_ERR_INTERRUPTED = 6, /* stopped by a signal after a complete checkpoint */
  ESP_ERR_DIVERGED = 7     /* non-finite or watchdog */
} esp_status;

/* The message of the last failure on this thread; "" if there was none. Never NULL. */
ESP_API const char *esp_error_message(void);
/* Forgets the message of this thread. */
ESP_API void esp_error_clear(void);

#ifdef __cplusplus
}
#endif
#endif
