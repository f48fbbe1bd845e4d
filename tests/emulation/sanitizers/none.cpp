// Without a sanitizer: nothing. address.cpp and thread.cpp each define some of these anew.
#include "../sanitizer.h"

#define FASTCONV_DEFAULT __attribute__((weak))

namespace emulation::sanitizer {

FASTCONV_DEFAULT int sets(int) { return 1; }
FASTCONV_DEFAULT void begin_launch() {}
FASTCONV_DEFAULT void end_launch() {}
FASTCONV_DEFAULT void begin_block() {}
FASTCONV_DEFAULT void begin_thread() {}
FASTCONV_DEFAULT void end_thread() {}
FASTCONV_DEFAULT void create(Fiber&) {}
FASTCONV_DEFAULT void destroy(Fiber&) {}
FASTCONV_DEFAULT void name(Fiber&) {}
FASTCONV_DEFAULT void before_switch(Fiber&, Fiber&) {}
FASTCONV_DEFAULT void after_switch(Fiber&) {}
FASTCONV_DEFAULT void release(const void*) {}
FASTCONV_DEFAULT void acquire(const void*) {}
FASTCONV_DEFAULT void renew(void*, size_t) {}
FASTCONV_DEFAULT void poison(const void*, size_t) {}
FASTCONV_DEFAULT void unpoison(const void*, size_t) {}

}  // namespace emulation::sanitizer
