/* tensorboard.h: scalar event files that TensorBoard reads: TFRecord framing, hand-encoded protobuf. */
#ifndef ESP_TRAIN_TENSORBOARD_H
#define ESP_TRAIN_TENSORBOARD_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* Bytes of one record (length, masked crc32c, payload, masked crc32c); `out` has room for `n + 16`. */
size_t esp_tb_frame(const unsigned char *payload, size_t n, unsigned char *out);
/* The first event of a file: wall time and "brain.Event:2". Returns bytes written, framed; `out` has 64. */
size_t esp_tb_version(double wall, unsigned char *out);
/* One scalar. Names up to 64 bytes; `out` has 192. */
size_t esp_tb_scalar(double wall, int64_t step, const char *name, float value, unsigned char *out);
uint32_t esp_crc32c(const unsigned char *data, size_t n);

#endif
