/* fibres.cpp: runs the threads of a grid, one after the other, on the calling thread of the host.
 *
 * A thread of the grid runs until it waits for others. Only then does it need a stack of its own, so stacks belong to
 * workers: a worker runs threads to their end, one by one, until one of them waits in the middle; that one keeps the
 * stack, and another worker goes on. A kernel without barriers and collectives so costs one function call per thread.
 *
 * Which thread goes on when one waits is the schedule: forward takes the lowest lane of the running warp, then the
 * lowest warp; reverse the highest; shuffle any. Blocks run one after the other, in ascending, descending or mixed
 * order. Threads are never interrupted between two waits, so a race shows only if some order of those pieces differs;
 * three schedules together expose a missing barrier whatever its direction. */
#include "fibres.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "include/simcuda/language.h"
#include "include/simcuda/launch.h"
#include "include/simcuda/warp.h"
#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simcuda {
namespace {

constexpr int warp_lanes = 32;
constexpr int max_warps = 32;
constexpr int none = -1;

struct Site {
  const char *file;
  int line;
  bool operator==(const Site &o) const {
    return line == o.line && (file == o.file || strcmp(file, o.file) == 0);
  }
};

struct Group { /* lanes that wait for the rest of their mask */
  unsigned mask, arrived;
  Collective kind;
  Site site;
};

struct Warp {
  unsigned exists, runnable, started, done, at_block, at_warp;
  int groups;
  Group group[warp_lanes];
  uint64_t value[warp_lanes], result[warp_lanes];
  int source[warp_lanes];
  Site site[warp_lanes];
  Worker *owner[warp_lanes]; /* the stack on which a started thread waits */
};

struct Machine {
  bool active = false;
  const Launch *launch = nullptr;
  Schedule schedule = {Order::Forward, 1};
  Warp warp[max_warps];
  int threads = 0, warps = 0;
  unsigned warps_runnable = 0;
  int live = 0, arrived = 0; /* threads not at their end; threads at the block's barrier */
  Site barrier = {};
  Vote vote = Vote::None;
  int votes = 0, outcome = 0;
  int current = none;
  Worker *worker = nullptr;
  Worker *main = nullptr;
  std::vector<Worker *> idle;
  uint64_t random = 1;
  unsigned char *smem = nullptr;
};
Machine m;

uint64_t next_random() { /* xorshift64* */
  m.random ^= m.random >> 12;
  m.random ^= m.random << 25;
  m.random ^= m.random >> 27;
  return m.random * 0x2545F4914F6CDD1Dull;
}

int lowest(unsigned bits) {
  return __builtin_ctz(bits);
}
int highest(unsigned bits) {
  return 31 - __builtin_clz(bits);
}
int any_of(unsigned bits) {
  int skip = static_cast<int>((next_random() >> 33) % static_cast<unsigned>(__builtin_popcount(bits)));
  while (skip-- > 0) bits &= bits - 1;
  return lowest(bits);
}

void set_thread(int t) {
  m.current = t;
  unsigned i = static_cast<unsigned>(t);
  if (blockDim.y == 1 && blockDim.z == 1) {
    threadIdx = {i, 0, 0};
  } else {
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
}

void set_runnable(int w, unsigned lanes) {
  m.warp[w].runnable |= lanes;
  m.warps_runnable |= 1u << w;
}

/* The thread that goes on, no longer marked as runnable; none if all wait or are at their end. */
int pick() {
  if (m.warps_runnable == 0) return none;
  int here = m.current / warp_lanes;
  bool stay = m.warp[here].runnable != 0;
  int w = here, lane = 0;
  switch (m.schedule.order) {
  case Order::Forward:
    w = stay ? here : lowest(m.warps_runnable);
    lane = lowest(m.warp[w].runnable);
    break;
  case Order::Reverse:
    w = stay ? here : highest(m.warps_runnable);
    lane = highest(m.warp[w].runnable);
    break;
  case Order::Shuffle:
    w = any_of(m.warps_runnable);
    lane = any_of(m.warp[w].runnable);
    break;
  }
  Warp &warp = m.warp[w];
  warp.runnable &= ~(1u << lane);
  if (warp.runnable == 0) m.warps_runnable &= ~(1u << w);
  return w * warp_lanes + lane;
}

std::string name_of_thread(int t) {
  unsigned i = static_cast<unsigned>(t);
  char text[160];
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z, i % blockDim.x,
           i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  return text;
}

/* Blames a thread that is not necessarily the running one. */
[[noreturn]] void die_at(int t, const Site &site, const char *why) {
  m.active = false; /* the message names the thread itself */
  simcuda_die("%s: kernel %s, %s at %s:%d", why, kernel_name(m.launch->kernel).c_str(), name_of_thread(t).c_str(),
              site.file ? site.file : "?", site.line);
}

/* Nothing can run, and not everything is done: says who waits for whom. */
[[noreturn]] void report_deadlock() {
  for (int w = 0; w < m.warps; w++) {
    Warp &warp = m.warp[w];
    if (warp.at_warp == 0) continue;
    const Group &group = warp.group[0];
    int lane = lowest(group.arrived);
    int missing = lowest(group.mask & ~group.arrived);
    char why[200];
    snprintf(why, sizeof why, "warp collective with mask 0x%08x that lane %d of the mask does not reach (it %s)",
             group.mask, missing,
             warp.done >> missing & 1       ? "has left the kernel"
             : warp.at_block >> missing & 1 ? "waits at a barrier of the block"
                                            : "waits with another mask");
    die_at(w * warp_lanes + lane, warp.site[lane], why);
  }
  for (int w = 0; w < m.warps; w++) {
    if (m.warp[w].at_block == 0) continue;
    int lane = lowest(m.warp[w].at_block);
    die_at(w * warp_lanes + lane, m.warp[w].site[lane],
           "barrier of the block that a thread left the kernel without reaching");
  }
  abort(); /* live threads all wait at one of the two */
}

void resume(int t) {
  Warp &warp = m.warp[t / warp_lanes];
  unsigned bit = 1u << (t % warp_lanes);
  Worker *to = nullptr;
  if (warp.started & bit) {
    to = warp.owner[t % warp_lanes];
  } else if (m.idle.empty()) {
    to = worker_create();
  } else {
    to = m.idle.back();
    m.idle.pop_back();
  }
  set_thread(t);
  Worker *from = m.worker;
  m.worker = to;
  worker_switch(from, to);
}

/* The running thread waits until another makes it runnable again. */
void wait_here() {
  int self = m.current;
  m.warp[self / warp_lanes].owner[self % warp_lanes] = m.worker;
  int next = pick();
  if (next == none) report_deadlock();
  resume(next);
}

void finish_thread() {
  Warp &warp = m.warp[m.current / warp_lanes];
  warp.done |= 1u << (m.current % warp_lanes);
  m.live--;
}

} // namespace

/* What every worker does, for ever: the resumer has set which thread it begins with. */
void worker_main() {
  for (;;) {
    Warp &warp = m.warp[m.current / warp_lanes];
    warp.started |= 1u << (m.current % warp_lanes);
    m.launch->thread();
    finish_thread();
    int next = pick();
    if (next != none && !(m.warp[next / warp_lanes].started >> (next % warp_lanes) & 1)) {
      set_thread(next);
      continue;
    }
    m.idle.push_back(m.worker);
    if (next != none) {
      resume(next);
    } else {
      if (m.live > 0) report_deadlock();
      Worker *from = m.worker;
      m.worker = m.main;
      worker_switch(from, m.main);
    }
  }
}

int sync_block(Vote vote, int predicate, const char *file, int line) {
  int lane = m.current % warp_lanes, w = m.current / warp_lanes;
  Warp &warp = m.warp[w];
  Site site = {file, line};
  warp.site[lane] = site;
  if (m.arrived == 0) {
    m.barrier = site;
    m.vote = vote;
    m.votes = 0;
  } else if (!(m.barrier == site) || m.vote != vote) {
    char why[400];
    snprintf(why, sizeof why, "threads of one block wait at different barriers (others at %s:%d)", m.barrier.file,
             m.barrier.line);
    die_at(m.current, site, why);
  }
  m.votes += predicate != 0;
  m.arrived++;
  if (m.arrived < m.threads) {
    warp.at_block |= 1u << lane;
    wait_here();
    return m.outcome;
  }
  m.arrived = 0;
  m.outcome = vote == Vote::And ? m.votes == m.threads : vote == Vote::Or ? m.votes > 0 : m.votes;
  for (int i = 0; i < m.warps; i++) {
    if (m.warp[i].at_block == 0) continue;
    set_runnable(i, m.warp[i].at_block);
    m.warp[i].at_block = 0;
  }
  return m.outcome;
}

int lane_id() {
  return m.current % warp_lanes;
}

namespace {

uint64_t combine(Collective kind, const Warp &warp, unsigned mask) {
  uint64_t all = 0;
  bool first = true;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    int lane = lowest(rest);
    uint64_t v = warp.value[lane];
    switch (kind) {
    case Collective::Ballot:
      all |= static_cast<uint64_t>(v != 0) << lane;
      break;
    case Collective::Add:
      all = static_cast<uint32_t>(all + v);
      break;
    case Collective::Min:
      all = first || v < all ? v : all;
      break;
    case Collective::Max:
      all = first || v > all ? v : all;
      break;
    case Collective::And:
      all = first ? v : all & v;
      break;
    case Collective::Or:
      all |= v;
      break;
    case Collective::Xor:
      all ^= v;
      break;
    case Collective::Sync:
    case Collective::Shuffle:
      break;
    }
    first = false;
  }
  return all;
}

/* Every lane of the group is here: gives each its result. */
void complete(int w, const Group &group) {
  Warp &warp = m.warp[w];
  if (group.kind == Collective::Shuffle) {
    for (unsigned rest = group.mask; rest != 0; rest &= rest - 1) {
      int lane = lowest(rest);
      int source = warp.source[lane] & (warp_lanes - 1);
      if (!(group.mask >> source & 1)) {
        die_at(w * warp_lanes + lane, group.site, "shuffle that reads from a lane outside its mask");
      }
      warp.result[lane] = warp.value[source];
    }
  } else if (group.kind != Collective::Sync) {
    uint64_t all = combine(group.kind, warp, group.mask);
    for (unsigned rest = group.mask; rest != 0; rest &= rest - 1) warp.result[lowest(rest)] = all;
  }
}

Group *join_group(Warp &warp, int lane, Collective kind, unsigned mask, const Site &site) {
  for (int g = 0; g < warp.groups; g++) {
    Group &group = warp.group[g];
    if (group.mask != mask) continue;
    if (group.kind != kind || !(group.site == site)) {
      char why[400];
      snprintf(why, sizeof why, "lanes of one mask meet at different warp collectives (others at %s:%d)",
               group.site.file, group.site.line);
      die_at(m.current, site, why);
    }
    group.arrived |= 1u << lane;
    return &group;
  }
  warp.group[warp.groups] = {mask, 1u << lane, kind, site};
  return &warp.group[warp.groups++];
}

} // namespace

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int source, const char *file, int line) {
  int lane = m.current % warp_lanes, w = m.current / warp_lanes;
  unsigned bit = 1u << lane;
  Warp &warp = m.warp[w];
  Site site = {file, line};
  warp.site[lane] = site;
  if (!(mask & bit)) die_at(m.current, site, "warp collective called by a lane that its mask does not name");
  if (mask & ~warp.exists)
    die_at(m.current, site, "warp collective whose mask names lanes that the block does not have");
  if (mask & warp.done) die_at(m.current, site, "warp collective whose mask names lanes that have left the kernel");
  warp.value[lane] = value;
  warp.source[lane] = source;
  Group *group = join_group(warp, lane, kind, mask, site);
  if (group->arrived != mask) {
    warp.at_warp |= bit;
    wait_here();
    return warp.result[lane];
  }
  complete(w, *group);
  unsigned others = mask & ~bit;
  *group = warp.group[--warp.groups];
  warp.at_warp &= ~others;
  if (others != 0) set_runnable(w, others);
  return warp.result[lane];
}

void *dynamic_smem() {
  return m.smem;
}

namespace {

void begin_block(const dim3 &grid, uint64_t index) {
  blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
              static_cast<unsigned>(index / grid.x / grid.y)};
  m.random = (m.schedule.seed * 0x9E3779B97F4A7C15ull + index + 1) | 1;
  m.live = m.threads;
  m.arrived = 0;
  m.warps_runnable = 0;
  for (int w = 0; w < m.warps; w++) {
    Warp &warp = m.warp[w];
    int lanes = m.threads - w * warp_lanes;
    warp.exists = lanes >= warp_lanes ? 0xffffffffu : (1u << lanes) - 1;
    warp.started = warp.done = warp.at_block = warp.at_warp = 0;
    warp.runnable = 0;
    warp.groups = 0;
    set_runnable(w, warp.exists);
  }
  m.current = m.schedule.order == Order::Reverse ? m.threads - 1 : 0;
}

/* Position of a block in the schedule's order. For shuffle an affine map, which visits each block once. */
uint64_t block_at(uint64_t i, uint64_t blocks) {
  if (m.schedule.order == Order::Forward) return i;
  if (m.schedule.order == Order::Reverse) return blocks - 1 - i;
  uint64_t step = (m.schedule.seed * 2654435761u) % blocks | 1;
  auto gcd = [](uint64_t a, uint64_t b) {
    while (b != 0) {
      uint64_t r = a % b;
      a = b;
      b = r;
    }
    return a;
  };
  while (gcd(step, blocks) != 1) step += 2;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(step) * i + m.schedule.seed) % blocks);
}

} // namespace

void run_grid(const Launch &launch, const Schedule &schedule, const std::vector<Variable> &shared) {
  constexpr size_t smem_alignment = 128;
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t guard = 0; /* the sanitizer has its own */
#else
  constexpr size_t guard = 64;
#endif
  m.launch = &launch;
  m.schedule = schedule;
  blockDim = launch.block;
  gridDim = launch.grid;
  m.threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  m.warps = (m.threads + warp_lanes - 1) / warp_lanes;
  if (m.main == nullptr) m.main = worker_of_host();
  m.worker = m.main;
  /* A block of its own for each launch, so that a sanitizer sees the first byte behind it. */
  void *smem = nullptr;
  if (launch.smem > 0 && posix_memalign(&smem, smem_alignment, launch.smem + guard) != 0) {
    simcuda_die("out of host memory");
  }
  m.smem = static_cast<unsigned char *>(smem);
  m.active = true;
  uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  for (uint64_t i = 0; i < blocks; i++) {
    begin_block(launch.grid, block_at(i, blocks));
    if (launch.smem > 0) memset(m.smem, poison_byte, launch.smem + guard);
    for (const Variable &v : shared) memset(v.address, poison_byte, v.bytes);
    resume(pick());
    for (size_t i = 0; launch.smem > 0 && i < guard; i++) {
      if (m.smem[launch.smem + i] != poison_byte) {
        simcuda_die("a thread of the block wrote past its dynamic shared memory of %zu bytes, at byte %zu", launch.smem,
                    launch.smem + i);
      }
    }
  }
  m.active = false;
  m.smem = nullptr;
  free(smem);
}

std::string where() {
  if (!m.active) return "";
  return "kernel " + kernel_name(m.launch->kernel) + ", " + name_of_thread(m.current);
}

} // namespace simcuda

extern "C" void simcuda_die(const char *format, ...) {
  std::string where = simcuda::where();
  va_list args;
  va_start(args, format);
  fprintf(stderr, "simcuda: ");
  vfprintf(stderr, format, args);
  va_end(args);
  fprintf(stderr, "%s%s\n", where.empty() ? "" : ": ", where.c_str());
  abort();
}
