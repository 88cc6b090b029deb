/* tensorboard.c. Record: uint64 length, masked crc32c of the length, data, masked crc32c of the data, little-endian
 * (TensorFlow, core/lib/io/record_writer). Event (core/util/event.proto): 1 wall_time double, 2 step int64,
 * 3 file_version string, 5 summary { 1 value { 1 tag string, 2 simple_value float } }. */
#include "train/tensorboard.h"

#include <string.h>

uint32_t esp_crc32c(const unsigned char *data, size_t n) {
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < n; i++) {
    crc ^= data[i];
    for (int k = 0; k < 8; k++) crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1u)));
  }
  return crc ^ 0xffffffffu;
}

static size_t put_bytes(unsigned char *out, uint64_t v, int bytes) {
  for (int i = 0; i < bytes; i++) out[i] = (unsigned char)(v >> (8 * i));
  return (size_t)bytes;
}
static size_t put_varint(unsigned char *out, uint64_t v) {
  size_t n = 0;
  while (v >= 0x80) out[n++] = (unsigned char)(v | 0x80), v >>= 7;
  out[n++] = (unsigned char)v;
  return n;
}
static size_t put_mask(unsigned char *out, const unsigned char *data, size_t n) {
  uint32_t crc = esp_crc32c(data, n);
  return put_bytes(out, ((crc >> 15) | (crc << 17)) + 0xa282ead8u, 4);
}

size_t esp_tb_frame(const unsigned char *payload, size_t n, unsigned char *out) {
  size_t at = put_bytes(out, n, 8);
  at += put_mask(out + at, out, 8);
  memcpy(out + at, payload, n);
  at += n;
  return at + put_mask(out + at, payload, n);
}

static size_t put_wall(unsigned char *out, double wall) {
  uint64_t bits;
  memcpy(&bits, &wall, 8);
  out[0] = 0x09; /* field 1, 64 bits */
  return 1 + put_bytes(out + 1, bits, 8);
}

size_t esp_tb_version(double wall, unsigned char *out) {
  static const char version[] = "brain.Event:2";
  unsigned char e[48];
  size_t n = put_wall(e, wall);
  e[n++] = 0x1a; /* field 3, string */
  n += put_varint(e + n, sizeof version - 1);
  memcpy(e + n, version, sizeof version - 1);
  return esp_tb_frame(e, n + sizeof version - 1, out);
}

size_t esp_tb_scalar(double wall, int64_t step, const char *name, float value, unsigned char *out) {
  unsigned char v[96], e[160];
  size_t len = strnlen(name, 64), nv = 0, n = put_wall(e, wall);
  v[nv++] = 0x0a; /* tag */
  nv += put_varint(v + nv, len);
  memcpy(v + nv, name, len);
  nv += len;
  v[nv++] = 0x15; /* simple_value, 32 bits */
  uint32_t bits;
  memcpy(&bits, &value, 4);
  nv += put_bytes(v + nv, bits, 4);
  e[n++] = 0x10; /* step */
  n += put_varint(e + n, (uint64_t)step);
  e[n++] = 0x2a; /* summary */
  n += put_varint(e + n, nv + 2);
  e[n++] = 0x0a; /* value; nv < 128 */
  n += put_varint(e + n, nv);
  memcpy(e + n, v, nv);
  return esp_tb_frame(e, n + nv, out);
}
