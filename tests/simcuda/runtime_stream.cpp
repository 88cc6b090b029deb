/* runtime_stream.cpp: streams, events, copies. Work runs when it is issued, or, with SIMCUDA_DEFER, as late as the
 * order that the program asked for allows: lazy   a stream runs only when the host waits for it or another stream does,
 * so that a consumer which does not wait for its producer reads what was there before; hasty  all other streams run
 * first, as far as they can, so that a producer which does not wait for the consumer of the round before overwrites
 * what that one has not read yet. Copies from page-locked memory read it when they run, as the real ones do. */
#include <string.h>
#include <time.h>

#include <algorithm>
#include <condition_variable>

#include "runtime.h"

namespace simcuda {

std::mutex streams_lock;

namespace {

typedef std::unique_lock<std::mutex> Hold;
std::condition_variable idle;

double now_ms() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) * 1e-6;
}

/* The first operation of the queue; the lock is released while it works. */
void run_first(CUstream_st *stream, Hold &hold) {
  Op op = std::move(stream->queue.front());
  stream->queue.pop_front();
  if (op.kind == Op::Record) {
    op.moment->at_ms = now_ms();
    op.moment->done = true;
    return;
  }
  if (op.kind == Op::Wait) return;
  stream->busy = true;
  hold.unlock();
  device_work_begins();
  op.work();
  check_guards(op.what.c_str());
  device_work_ends();
  hold.lock();
  stream->busy = false;
  idle.notify_all();
}

bool can_run(const CUstream_st *stream) {
  if (stream->busy || stream->queue.empty()) return false;
  const Op &op = stream->queue.front();
  return op.kind != Op::Wait || op.moment->done;
}

void run_others(const CUstream_st *stream, Hold &hold) {
  for (bool ran = true; ran;) {
    ran = false;
    for (size_t i = 0; i < streams().size(); i++) {
      CUstream_st *other = streams()[i];
      if (other == stream || !can_run(other)) continue;
      run_first(other, hold);
      ran = true;
    }
  }
}

/* Runs the stream until `moment` is done, or all of it if that is null. */
void drain(CUstream_st *stream, const Moment *moment, Hold &hold) {
  while (!(moment && moment->done)) {
    if (stream->busy) {
      idle.wait(hold);
      continue;
    }
    if (settings().defer == Defer::Hasty) {
      run_others(stream, hold);
      if (stream->busy || (moment && moment->done)) continue;
    }
    if (stream->queue.empty()) return;
    const Op &op = stream->queue.front();
    if (op.kind == Op::Wait && !op.moment->done) {
      std::shared_ptr<Moment> awaited = op.moment;
      drain(awaited->stream, awaited.get(), hold);
      continue;
    }
    run_first(stream, hold);
  }
}

/* Whoever asks again and again whether work is done must see it go on. */
void make_progress(CUstream_st *stream, Hold &hold) {
  if (stream->busy || stream->queue.empty()) return;
  const Op &op = stream->queue.front();
  if (op.kind == Op::Wait && !op.moment->done) {
    make_progress(op.moment->stream, hold);
  } else {
    run_first(stream, hold);
  }
}

} // namespace

std::vector<CUstream_st *> &streams() {
  static std::vector<CUstream_st *> all = {new CUstream_st()};
  return all;
}

CUstream_st *stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) return streams()[0];
  auto found = std::find(streams().begin(), streams().end(), handle);
  return found == streams().end() ? nullptr : *found;
}

cudaError_t submit(cudaStream_t handle, Op op) {
  Hold hold(streams_lock);
  CUstream_st *stream = stream_of(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (stream->recording) return record_op(stream, op) ? cudaSuccess : fail(cudaErrorStreamCaptureInvalidated);
  stream->queue.push_back(std::move(op));
  if (settings().defer == Defer::Never) drain(stream, nullptr, hold);
  return cudaSuccess;
}

void drain_device() {
  Hold hold(streams_lock);
  /* The youngest first: a consumer before its producer, if nothing says otherwise. */
  for (size_t i = streams().size(); i-- > 0;) {
    if (i < streams().size()) drain(streams()[i], nullptr, hold);
  }
}

namespace {

/* A copy or a fill stays inside one allocation where it touches device memory; kinds must fit the pointers. */
bool copy_fits(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind) {
  Place place;
  if (touches_block(dst, &place) && !find_block(dst, bytes, nullptr)) return false;
  if (touches_block(src, &place) && !find_block(src, bytes, nullptr)) return false;
  bool to_device = simcuda_is_device(dst, bytes), from_device = simcuda_is_device(src, bytes);
  switch (kind) {
  case cudaMemcpyHostToHost:
    return !to_device && !from_device;
  case cudaMemcpyHostToDevice:
    return to_device && !from_device;
  case cudaMemcpyDeviceToHost:
    return !to_device && from_device;
  case cudaMemcpyDeviceToDevice:
    return to_device && from_device;
  default:
    return true;
  }
}

cudaError_t copy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream, bool wait) {
  if (bytes == 0) return cudaSuccess;
  if (dst == nullptr || src == nullptr || !copy_fits(dst, src, bytes, kind)) return cudaErrorInvalidValue;
  bool from_pageable = !simcuda_is_device(src, bytes) && !simcuda_is_pinned(src, bytes);
  bool to_pageable = !simcuda_is_device(dst, bytes) && !simcuda_is_pinned(dst, bytes);
  bool recorded;
  {
    Hold hold(streams_lock);
    CUstream_st *s = stream_of(stream);
    recorded = s != nullptr && s->recording != nullptr;
  }
  Op op = {Op::Work, "copy", nullptr, nullptr};
  if (from_pageable && !recorded) {
    /* The driver takes such a source over into its own memory before it returns. */
    const char *from = static_cast<const char *>(src);
    auto taken = std::make_shared<std::vector<char>>(from, from + bytes);
    op.work = [dst, taken] { memcpy(dst, taken->data(), taken->size()); };
  } else {
    op.work = [dst, src, bytes] { memmove(dst, src, bytes); };
  }
  cudaError_t e = submit(stream, std::move(op));
  if (e == cudaSuccess && !recorded && (wait || to_pageable)) {
    Hold hold(streams_lock);
    CUstream_st *s = stream_of(stream);
    if (s) drain(s, nullptr, hold);
  }
  return e;
}

/* What the legacy default stream waits for. */
void drain_blocking_streams() {
  Hold hold(streams_lock);
  for (size_t i = 0; i < streams().size(); i++) {
    if (!(streams()[i]->flags & cudaStreamNonBlocking)) drain(streams()[i], nullptr, hold);
  }
}

cudaError_t create_stream(cudaStream_t *stream, unsigned flags, int priority) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (stream == nullptr || flags & ~static_cast<unsigned>(cudaStreamNonBlocking)) return fail(cudaErrorInvalidValue);
  CUstream_st *made = new CUstream_st();
  made->flags = flags;
  made->priority = priority;
  made->device = current_device();
  Hold hold(streams_lock);
  streams().push_back(made);
  *stream = made;
  return cudaSuccess;
}

} // namespace
} // namespace simcuda

using namespace simcuda;

extern "C" {

cudaError_t simcuda_enqueue(cudaStream_t stream, void (*fn)(void *), const void *arg, size_t arg_bytes) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = count_launch();
  if (e != cudaSuccess) return fail(e);
  const char *bytes = static_cast<const char *>(arg);
  auto kept = std::make_shared<const std::vector<char>>(bytes, bytes + arg_bytes);
  auto work = [fn, kept] {
    std::vector<char> own(*kept); /* fn may write to it */
    fn(own.data());
  };
  return submit(stream, {Op::Work, "library call", work, nullptr});
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return create_stream(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return create_stream(stream, flags, 0);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return create_stream(stream, flags, priority);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  Hold hold(streams_lock);
  CUstream_st *stream = stream_of(handle);
  if (stream == nullptr || stream == streams()[0]) return fail(cudaErrorInvalidResourceHandle);
  drain(stream, nullptr, hold);
  streams().erase(std::find(streams().begin(), streams().end(), stream));
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  Hold hold(streams_lock);
  CUstream_st *stream = stream_of(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  e = spoil_if_capturing(stream);
  if (e != cudaSuccess) return fail(e);
  drain(stream, nullptr, hold);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  Hold hold(streams_lock);
  CUstream_st *stream = stream_of(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  e = spoil_if_capturing(stream);
  if (e != cudaSuccess) return fail(e);
  make_progress(stream, hold);
  return stream->queue.empty() && !stream->busy ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaDeviceSynchronize(void) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  drain_device();
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (event == nullptr) return fail(cudaErrorInvalidResourceHandle);
  std::shared_ptr<Moment> moment;
  {
    Hold hold(streams_lock);
    CUstream_st *stream = stream_of(handle);
    if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
    moment = event->moment;
    if (moment == nullptr) return cudaSuccess; /* never recorded */
    if (moment->graph || stream->recording) {
      e = capture_wait(stream, *moment);
      return fail(e);
    }
  }
  return submit(handle, {Op::Wait, "wait", nullptr, moment});
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (event == nullptr) return fail(cudaErrorInvalidValue);
  *event = new CUevent_st();
  (*event)->flags = flags;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (event == nullptr) return fail(cudaErrorInvalidResourceHandle);
  delete event; /* who waits for its moment holds that */
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (event == nullptr) return fail(cudaErrorInvalidResourceHandle);
  auto moment = std::make_shared<Moment>();
  {
    Hold hold(streams_lock);
    CUstream_st *stream = stream_of(handle);
    if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
    moment->stream = stream;
    moment->graph = stream->recording;
    event->moment = moment;
    if (stream->recording) return stream->recording->spoilt ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
  }
  return submit(handle, {Op::Record, "record", nullptr, moment});
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  if (event == nullptr) return fail(cudaErrorInvalidResourceHandle);
  Hold hold(streams_lock);
  std::shared_ptr<Moment> moment = event->moment;
  if (moment == nullptr || moment->done) return cudaSuccess;
  if (moment->graph) return fail(cudaErrorCapturedEvent);
  make_progress(moment->stream, hold);
  return moment->done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  if (event == nullptr) return fail(cudaErrorInvalidResourceHandle);
  Hold hold(streams_lock);
  std::shared_ptr<Moment> moment = event->moment;
  if (moment == nullptr) return cudaSuccess;
  if (moment->graph) return fail(cudaErrorCapturedEvent);
  if (!moment->done) drain(moment->stream, moment.get(), hold);
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (ms == nullptr) return fail(cudaErrorInvalidValue);
  if (start == nullptr || end == nullptr || (start->flags | end->flags) & cudaEventDisableTiming || !start->moment ||
      !end->moment) {
    return fail(cudaErrorInvalidResourceHandle);
  }
  Hold hold(streams_lock);
  if (!start->moment->done || !end->moment->done) return cudaErrorNotReady;
  *ms = static_cast<float>(end->moment->at_ms - start->moment->at_ms);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = copy(dst, src, bytes, kind, stream, false);
  return fail(e);
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  drain_blocking_streams();
  return fail(copy(dst, src, bytes, kind, nullptr, true));
}

cudaError_t cudaMemsetAsync(void *ptr, int value, size_t bytes, cudaStream_t stream) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (bytes == 0) return cudaSuccess;
  if (!simcuda_is_device(ptr, bytes) && !simcuda_is_pinned(ptr, bytes)) return fail(cudaErrorInvalidValue);
  return submit(stream, {Op::Work, "memset", [ptr, value, bytes] { memset(ptr, value, bytes); }, nullptr});
}

cudaError_t cudaMemset(void *ptr, int value, size_t bytes) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  drain_blocking_streams();
  return cudaMemsetAsync(ptr, value, bytes, nullptr);
}

} // extern "C"
