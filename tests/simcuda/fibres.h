/* fibres.h: stacks, and changing from one to another. A worker is a stack that runs worker_main for ever. */
#ifndef SIMCUDA_FIBRES_H
#define SIMCUDA_FIBRES_H

#include <stddef.h>

namespace simcuda {

struct Worker;

/* A worker that will begin worker_main when it is first switched to. Never freed: workers are used again. */
Worker *worker_create();
/* Stands for the host's own stack. */
Worker *worker_of_host();
/* Goes on in `to`; returns when something switches back to `from`, which is the running one. */
void worker_switch(Worker *from, Worker *to);
/* Defined by the scheduler; does not return. */
void worker_main();
/* [begin, begin + bytes) of the guard page under a worker's stack, if address lies in one: the stack overflowed. */
bool is_stack_guard(const void *address);

/* What memory holds that nobody wrote: NaN in every floating point type, -1 as an integer. */
constexpr int poison_byte = 0xff;

} // namespace simcuda

#endif
