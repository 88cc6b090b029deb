/* graph.c: recorded pieces. A small model's step is hundreds of launches of a few microseconds each, and issuing them
 * costs the host more than the device needs; a piece whose operations are the same every time is captured once into a
 * CUDA graph and launched as one.
 *
 * A key is issued directly the first time (libraries choose algorithms, scratch grows), captured the second, replayed
 * from the third on. A pair is replayed together or not at all: the backward of a pass needs what the host kept of its
 * forward, which a replayed forward does not make anew. */
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/cuda.h"

enum { MOST_PIECES = 256 };

typedef struct piece {
  uint64_t key;
  cudaGraphExec_t exec; /* NULL: not recorded yet */
  bool never;           /* could not be recorded */
} piece;

struct esp_cuda_pieces {
  piece list[MOST_PIECES];
  int count;
  piece *recording;
};

static piece *find(const esp_cuda_pieces *p, uint64_t key) {
  for (int i = 0; p && i < p->count; i++)
    if (p->list[i].key == key) return (piece *)&p->list[i];
  return NULL;
}

bool esp_cuda_piece_begin(esp_backend *be, uint64_t key, uint64_t pair) {
  esp_cuda *c = esp_cuda_of(be);
  if (be->sticky != ESP_OK || c->no_pieces) return false;
  if (!c->pieces) {
    c->pieces = calloc(1, sizeof *c->pieces);
    if (!c->pieces) return false;
  }
  esp_cuda_pieces *p = c->pieces;
  p->recording = NULL;
  piece *e = find(p, key);
  if (!e) {
    /* Full of pieces of models and shapes that are gone: begin anew. A backward is never the first to find that, since
     * its forward has only been replayed if it is recorded itself. */
    if (p->count == MOST_PIECES) {
      esp_cuda_pieces_destroy(be);
      return esp_cuda_piece_begin(be, key, pair);
    }
    p->list[p->count++] = (piece){.key = key};
    return false;
  }
  if (e->never) return false;
  if (e->exec) {
    const piece *other = pair ? find(p, pair) : NULL;
    if (pair && (!other || !other->exec)) return false;
    return esp_cuda_ok(be, cudaGraphLaunch(e->exec, c->stream), "a recorded piece");
  }
  if (!esp_cuda_ok(be, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "recording")) return false;
  c->capturing = true;
  p->recording = e;
  return false;
}

void esp_cuda_piece_end(esp_backend *be) {
  esp_cuda *c = esp_cuda_of(be);
  if (!c->capturing) return;
  piece *e = c->pieces->recording;
  cudaGraph_t graph = NULL;
  cudaError_t err = cudaStreamEndCapture(c->stream, &graph);
  c->capturing = false;
  c->pieces->recording = NULL;
  if (esp_cuda_ok(be, err, "recording") && graph) {
    /* Nothing has run yet: without an executable graph the step would be missing, so that is an error of the step. */
    if (esp_cuda_ok(be, cudaGraphInstantiate(&e->exec, graph, 0), "recording"))
      esp_cuda_ok(be, cudaGraphLaunch(e->exec, c->stream), "a recorded piece");
  }
  e->never = !e->exec;
  if (graph) cudaGraphDestroy(graph);
}

void esp_cuda_pieces_destroy(esp_backend *be) {
  esp_cuda *c = esp_cuda_of(be);
  if (!c->pieces) return;
  cudaStreamSynchronize(c->stream);
  for (int i = 0; i < c->pieces->count; i++)
    if (c->pieces->list[i].exec) cudaGraphExecDestroy(c->pieces->list[i].exec);
  free(c->pieces);
  c->pieces = NULL;
}
