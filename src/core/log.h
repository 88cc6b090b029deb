/* log.h: counted facts for the person at the terminal. The library prints nothing: it hands lines to the sink that the
 * program installed (none by default). */
#ifndef ESP_CORE_LOG_H
#define ESP_CORE_LOG_H

typedef enum esp_log_level { ESP_LOG_DEBUG, ESP_LOG_INFO, ESP_LOG_NOTICE } esp_log_level;
typedef void (*esp_log_sink)(void *ctx, esp_log_level level, const char *line);
void esp_log_set_sink(esp_log_sink sink, void *ctx);
void esp_log(esp_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
double esp_now(void); /* monotonic seconds */

#endif
