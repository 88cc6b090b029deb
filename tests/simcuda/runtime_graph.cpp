/* runtime_graph.cpp: recording what is put on streams, and running it again. */
#include <algorithm>

#include "runtime.h"

namespace simcuda {
namespace {

typedef std::lock_guard<std::mutex> Hold;

std::vector<CUgraph_st *> open_graphs; /* under the lock of the streams */

void stop_recording(CUgraph_st *graph) {
  for (CUstream_st *s : streams()) {
    if (s->recording != graph) continue;
    s->recording = nullptr;
    s->origin = false;
    s->joined = true;
  }
  graph->open = false;
  open_graphs.erase(std::remove(open_graphs.begin(), open_graphs.end(), graph), open_graphs.end());
}

} // namespace

bool record_op(CUstream_st *stream, const Op &op) {
  if (stream->recording->spoilt) return false;
  stream->joined = stream->origin;
  stream->recording->ops.push_back(op);
  return true;
}

cudaError_t capture_wait(CUstream_st *stream, const Moment &moment) {
  if (moment.graph == nullptr) {
    if (moment.done && stream->recording == nullptr) return cudaSuccess;
    stream->recording->spoilt = true;
    return cudaErrorStreamCaptureIsolation;
  }
  bool open = std::find(open_graphs.begin(), open_graphs.end(), moment.graph) != open_graphs.end();
  if (!open || (stream->recording && stream->recording != moment.graph)) return cudaErrorStreamCaptureIsolation;
  if (moment.graph->spoilt) return cudaErrorStreamCaptureInvalidated;
  if (stream->recording == nullptr) stream->joined = false;
  stream->recording = moment.graph;
  if (moment.stream != stream) moment.stream->joined = true;
  return cudaSuccess;
}

cudaError_t unsafe_while_capturing() {
  Hold hold(streams_lock);
  cudaError_t e = cudaSuccess;
  for (CUgraph_st *graph : open_graphs) {
    bool forbids = graph->mode == cudaStreamCaptureModeGlobal ||
                   (graph->mode == cudaStreamCaptureModeThreadLocal && graph->thread == std::this_thread::get_id());
    if (!forbids) continue;
    graph->spoilt = true;
    e = cudaErrorStreamCaptureUnsupported;
  }
  return e;
}

cudaError_t spoil_if_capturing(CUstream_st *stream) {
  if (stream->recording == nullptr) return cudaSuccess;
  stream->recording->spoilt = true;
  return cudaErrorStreamCaptureUnsupported;
}

} // namespace simcuda

using namespace simcuda;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  Hold hold(streams_lock);
  CUstream_st *stream = stream_of(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (stream == streams()[0]) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->recording) return fail(cudaErrorIllegalState);
  CUgraph_st *graph = new CUgraph_st();
  graph->mode = mode;
  graph->thread = std::this_thread::get_id();
  graph->open = true;
  open_graphs.push_back(graph);
  stream->recording = graph;
  stream->origin = true;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *result) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (result == nullptr) return fail(cudaErrorInvalidValue);
  *result = nullptr;
  Hold hold(streams_lock);
  CUstream_st *stream = stream_of(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  CUgraph_st *graph = stream->recording;
  if (graph == nullptr) return fail(cudaErrorIllegalState);
  if (!stream->origin) return fail(cudaErrorStreamCaptureUnmatched);
  if (graph->mode != cudaStreamCaptureModeRelaxed && graph->thread != std::this_thread::get_id()) {
    return fail(cudaErrorStreamCaptureWrongThread);
  }
  if (graph->spoilt) e = cudaErrorStreamCaptureInvalidated;
  for (const CUstream_st *s : streams()) {
    if (e == cudaSuccess && s->recording == graph && !s->origin && !s->joined) e = cudaErrorStreamCaptureUnjoined;
  }
  stop_recording(graph);
  if (e == cudaSuccess) {
    *result = graph;
  } else {
    delete graph;
  }
  return fail(e);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (status == nullptr) return fail(cudaErrorInvalidValue);
  Hold hold(streams_lock);
  const CUstream_st *stream = stream_of(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  *status = stream->recording == nullptr ? cudaStreamCaptureStatusNone
            : stream->recording->spoilt  ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (exec == nullptr || graph == nullptr) return fail(cudaErrorInvalidValue);
  *exec = new CUgraphExec_st();
  (*exec)->ops = graph->ops;
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t) {
  cudaError_t e = usable();
  if (e == cudaSuccess && exec == nullptr) e = cudaErrorInvalidValue;
  return fail(e);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  cudaError_t e = usable();
  if (e == cudaSuccess && exec == nullptr) e = cudaErrorInvalidValue;
  if (e == cudaSuccess) e = count_launch();
  if (e != cudaSuccess) return fail(e);
  for (const Op &op : exec->ops) {
    e = submit(stream, op);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (graph == nullptr || count == nullptr || nodes != nullptr) return fail(cudaErrorInvalidValue); /* counts only */
  *count = graph->ops.size();
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  cudaError_t e = usable();
  if (e == cudaSuccess && exec == nullptr) e = cudaErrorInvalidValue;
  if (e != cudaSuccess) return fail(e);
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  cudaError_t e = usable();
  if (e == cudaSuccess && graph == nullptr) e = cudaErrorInvalidValue;
  if (e != cudaSuccess) return fail(e);
  delete graph;
  return cudaSuccess;
}

} // extern "C"
