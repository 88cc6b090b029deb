/* fibres_switch.cpp: stacks and the change between them, by 15 instructions on x86-64 and arm64, by ucontext elsewhere,
 * with AddressSanitizer told about each change. */
#include "fibres.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <vector>

#include "include/simcuda.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) || defined(__aarch64__)
extern "C" __attribute__((visibility("hidden"))) void simcuda_switch(void **save, void *to);
#else
#include <ucontext.h>
#define SIMCUDA_UCONTEXT
#endif

namespace simcuda {

struct Worker {
  char *stack; /* lowest address; of the host's own stack as the sanitizer reports it */
  size_t bytes;
  void *sp;
  void *sanitizer; /* its fake stack while the worker does not run */
  bool host;
#ifdef SIMCUDA_UCONTEXT
  ucontext_t context;
#endif
};

namespace {

constexpr size_t page = 4096;
/* Not a power of two, so that the hot ends of many stacks do not share the same few lines of the caches. */
constexpr size_t stack_bytes = 65 * page;
constexpr size_t colours = 31, colour_bytes = 128;

std::vector<char *> guards;
Worker *switched_from;

/* On the stack just changed to: tells the sanitizer, and learns from it where the host's own stack lies. */
void arrived(void *fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  const void *bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
  if (switched_from->host) {
    switched_from->stack = static_cast<char *>(const_cast<void *>(bottom));
    switched_from->bytes = bytes;
  }
#else
  (void)fake_stack;
#endif
}

extern "C" void simcuda_worker_entry() {
  arrived(nullptr);
  worker_main();
}

} // namespace

Worker *worker_of_host() {
  Worker *worker = new Worker();
  worker->host = true;
  return worker;
}

Worker *worker_create() {
  void *memory =
      mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0)
    simcuda_die("no memory for the stack of a thread");
  Worker *worker = new Worker();
  guards.push_back(static_cast<char *>(memory));
  worker->stack = static_cast<char *>(memory) + page;
  worker->bytes = stack_bytes;
  char *top = worker->stack + stack_bytes - guards.size() % colours * colour_bytes;
#if defined(__x86_64__)
  /* The frame that simcuda_switch takes off: six registers, the address it returns to, and one word so that the stack
   * is aligned as at the begin of a function. */
  void **frame = reinterpret_cast<void **>(top) - 8;
  frame[6] = reinterpret_cast<void *>(simcuda_worker_entry);
  worker->sp = frame;
#elif defined(__aarch64__)
  /* x19 to x30 and d8 to d15; the link register is the twelfth. */
  void **frame = reinterpret_cast<void **>(top) - 20;
  frame[11] = reinterpret_cast<void *>(simcuda_worker_entry);
  worker->sp = frame;
#else
  getcontext(&worker->context);
  worker->context.uc_stack.ss_sp = worker->stack;
  worker->context.uc_stack.ss_size = static_cast<size_t>(top - worker->stack);
  worker->context.uc_link = nullptr;
  makecontext(&worker->context, simcuda_worker_entry, 0);
#endif
  return worker;
}

void worker_switch(Worker *from, Worker *to) {
  switched_from = from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from->sanitizer, to->stack, to->bytes);
#endif
#ifdef SIMCUDA_UCONTEXT
  swapcontext(&from->context, &to->context);
#else
  simcuda_switch(&from->sp, to->sp);
#endif
  arrived(from->sanitizer);
}

bool is_stack_guard(const void *address) {
  const char *at = static_cast<const char *>(address);
  for (const char *guard : guards) {
    if (at >= guard && at < guard + page) return true;
  }
  return false;
}

} // namespace simcuda

#if defined(__x86_64__)
__asm__(".text\n"
        ".globl simcuda_switch\n"
        ".hidden simcuda_switch\n"
        ".type simcuda_switch, @function\n"
        "simcuda_switch:\n"
        "  pushq %rbp\n"
        "  pushq %rbx\n"
        "  pushq %r12\n"
        "  pushq %r13\n"
        "  pushq %r14\n"
        "  pushq %r15\n"
        "  movq %rsp, (%rdi)\n"
        "  movq %rsi, %rsp\n"
        "  popq %r15\n"
        "  popq %r14\n"
        "  popq %r13\n"
        "  popq %r12\n"
        "  popq %rbx\n"
        "  popq %rbp\n"
        "  ret\n"
        ".size simcuda_switch, .-simcuda_switch\n");
#elif defined(__aarch64__)
__asm__(".text\n"
        ".globl simcuda_switch\n"
        ".hidden simcuda_switch\n"
        ".type simcuda_switch, %function\n"
        "simcuda_switch:\n"
        "  sub sp, sp, #160\n"
        "  stp x19, x20, [sp, #0]\n"
        "  stp x21, x22, [sp, #16]\n"
        "  stp x23, x24, [sp, #32]\n"
        "  stp x25, x26, [sp, #48]\n"
        "  stp x27, x28, [sp, #64]\n"
        "  stp x29, x30, [sp, #80]\n"
        "  stp d8, d9, [sp, #96]\n"
        "  stp d10, d11, [sp, #112]\n"
        "  stp d12, d13, [sp, #128]\n"
        "  stp d14, d15, [sp, #144]\n"
        "  mov x9, sp\n"
        "  str x9, [x0]\n"
        "  mov sp, x1\n"
        "  ldp x19, x20, [sp, #0]\n"
        "  ldp x21, x22, [sp, #16]\n"
        "  ldp x23, x24, [sp, #32]\n"
        "  ldp x25, x26, [sp, #48]\n"
        "  ldp x27, x28, [sp, #64]\n"
        "  ldp x29, x30, [sp, #80]\n"
        "  ldp d8, d9, [sp, #96]\n"
        "  ldp d10, d11, [sp, #112]\n"
        "  ldp d12, d13, [sp, #128]\n"
        "  ldp d14, d15, [sp, #144]\n"
        "  add sp, sp, #160\n"
        "  ret\n"
        ".size simcuda_switch, .-simcuda_switch\n");
#endif
