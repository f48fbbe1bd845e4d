// Launches: the order of blocks and threads, and how a launch ends.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

#include "sanitizer.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

Machine machine;

namespace {

// The limits of sm_80 (CUDA C++ Programming Guide, Compute Capabilities).
constexpr unsigned max_block_z = 64, max_grid_yz = 65535, max_grid_x = 0x7fffffff;
constexpr size_t max_shared_bytes = 163 * 1024;
constexpr int max_idle_rounds = 10000;  // in which every thread that runs yields

thread_local std::string message;

// Walks over 0 … n−1 in the order that was set: from b on in steps of a, modulo n, with a prime to n.
struct Permutation {
  uint64_t a = 1, b = 0, n;
  Permutation(uint64_t n, std::mt19937& random) : n(n) {
    if (machine.order == 1) a = n - 1, b = n - 1;
    if (machine.order == 2) {
      b = random() % n;
      do a = n == 1 ? 1 : 1 + random() % (n - 1);
      while (std::gcd(a, n) != 1);
    }
  }
  uint64_t next() {
    const uint64_t here = b;
    b += a;
    if (b >= n) b -= n;
    return here;
  }
};

void run_block(std::mt19937& random) {
  machine.waiting_in_block = machine.done = 0;
  for (NamedBarrier& barrier : machine.barriers) barrier = {};
  for (unsigned i = 0; i < unsigned(machine.threads); ++i) {
    Fiber& fiber = machine.fibers[i];
    if (!fiber.stack) create(fiber);
    fiber.state = State::ready;
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    sanitizer::name(fiber);
  }
  sanitizer::begin_block();
  int idle_rounds = 0;
  while (machine.done < machine.threads && !machine.failed) {
    bool ran = false, progress = false;
    Permutation order(machine.threads, random);
    for (int i = 0; i < machine.threads && !machine.failed; ++i) {
      Fiber& fiber = machine.fibers[order.next()];
      if (fiber.state != State::ready) continue;
      ran = true;
      fiber.yielded = false;
      switch_to(fiber);
      progress = progress || !fiber.yielded;
    }
    idle_rounds = progress ? 0 : idle_rounds + 1;
    if (machine.failed) return;
    if (!ran) report_divergence();
    if (idle_rounds == max_idle_rounds)
      set_failure("kernel " + std::string(machine.kernel) + ", block " + name_of(blockIdx) +
                  ": its threads spin, and none goes on");
  }
}

}  // namespace

std::string place(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line()) + ":" + std::to_string(where.column());
}

std::string name_of(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

void set_failure(const std::string& text) {
  message = text;
  machine.failed = true;
}

int lane() { return index_of(*machine.current) % 32; }

uint32_t present_lanes(uint32_t mask) {
  const int present = machine.threads - (index_of(*machine.current) & ~31);
  return present < 32 ? mask & ((1u << present) - 1) : mask;
}

void fail(const Where& where, const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  set_failure("kernel " + std::string(machine.kernel) + ", block " + name_of(blockIdx) + ", thread " +
              name_of(threadIdx) + ", " + place(where) + ": " + text);
  switch_to(machine.scheduler);
  abort();  // a failed launch resumes nobody
}

const char* run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                     void* context) {
  const std::lock_guard lock(machine.mutex);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > max_block_threads || block.z > max_block_z) return "invalid block size";
  if (!grid.x || !grid.y || !grid.z || grid.x > max_grid_x || grid.y > max_grid_yz || grid.z > max_grid_yz)
    return "invalid grid size";
  if (shared_bytes > max_shared_bytes) return "too much shared memory";

  machine.kernel = kernel;
  machine.body = body;
  machine.context = context;
  machine.threads = int(threads);
  machine.failed = false;
  machine.current = &machine.scheduler;
  const int sets = sanitizer::sets(machine.threads);
  if (machine.pool.size() < sets * threads) machine.pool.resize(sets * threads);
  blockDim = block;
  gridDim = grid;

  sanitizer::begin_launch();
  new_shared_memory(shared_bytes);
  std::mt19937 random(machine.seed);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  Permutation order(blocks, random);
  for (uint64_t i = 0; i < blocks && !machine.failed; ++i) {
    const uint64_t b = order.next();
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    machine.fibers = &machine.pool[i % sets * threads];
    renew_shared_memory();
    run_block(random);
    if (!machine.failed && !shared_memory_guards_intact())
      set_failure("kernel " + std::string(kernel) + ", block " + name_of(blockIdx) +
                  ": wrote outside of its shared memory");
  }
  free_shared_memory();
  sanitizer::end_launch();
  if (!machine.failed) return nullptr;
  for (Fiber& fiber : machine.pool)  // some are left in the midst of the kernel
    if (fiber.stack) destroy(fiber);
  return message.c_str();
}

}  // namespace emulation

void fastconv_emulation_set_order(int order, unsigned seed) {
  const std::lock_guard lock(emulation::machine.mutex);
  emulation::machine.order = order;
  emulation::machine.seed = seed;
}

uint64_t fastconv_emulation_switches() { return emulation::machine.switches; }
