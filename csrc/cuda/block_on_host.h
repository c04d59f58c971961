// A model of one thread block on the host, for kernels written against cuda/hopper.h: its threads
// and how they wait for each other. What they call is in cuda/warps_on_host.h.
//
// Every CUDA thread is a fiber; one OS thread runs them, and a fiber gives way only in a collective
// or a wait. Which one goes on next is the order's choice, so results that differ between the
// orders show a barrier that is missing, and a wait without end is reported as a deadlock. The
// model throws at what the device leaves undefined. It needs glibc's ucontext.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace msvq {
namespace cuda {

constexpr int kProductColumns = 64;
using Accumulators = float[kProductColumns / 2];

struct uint3 {
  unsigned x, y, z;
};
inline thread_local uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

// The asynchronous products of one thread: what will be in `out` once it has waited.
struct PendingProducts {
  bool open;
  float* out;
  Accumulators values;
  uint64_t trace;  // of the calls, which must be the same in a whole warpgroup
};

// Copies that a thread has asked for. In even orders they are made when it waits for them: what it
// reads before is old. In odd ones at once: what they overwrite is gone.
struct AskedCopies {
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // the end of each
};

class BlockModel {
 public:
  // The arguments of the lanes of a warp, which `complete` reads and writes its results to.
  using Complete = void (*)(void* const* lanes);

  BlockModel(int threads, int order, char* memory, int bytes, void (*call)(const void*),
             const void* body)
      : threads_(threads), order_(order), memory_(memory), bytes_(bytes), call_(call), body_(body) {
    if (threads <= 0 || threads > 1024 || threads % 32 != 0)
      throw std::invalid_argument("a block is of 32 to 1024 threads, in whole warps");
    if (reinterpret_cast<uintptr_t>(memory) % 16 != 0)
      throw std::invalid_argument("shared memory begins at a multiple of 16 bytes");
    fibers_ = std::vector<Fiber>(static_cast<size_t>(threads));
    stacks_.reset(new char[static_cast<size_t>(threads) * kStack]);
    for (int i = 0; i < threads; ++i) {
      ucontext_t& context = fibers_[i].context;
      getcontext(&context);
      context.uc_stack.ss_sp = stack_of(i);
      context.uc_stack.ss_size = kStack;
      makecontext(&context, &BlockModel::enter, 0);
      memcpy(stack_of(i), &kUntouched, sizeof kUntouched);
      set_ready(i);
    }
  }

  void run() {
    if (running_) throw std::logic_error("a kernel cannot run another one");
    running_ = this;
    threadIdx.x = static_cast<unsigned>(next());
    swapcontext(&caller_, &fibers_[threadIdx.x].context);
    running_ = nullptr;
    // Fibers that have not ended are left where they are: a kernel owns nothing.
    if (error_) std::rethrow_exception(error_);
    if (ended_ < threads_) throw std::runtime_error(deadlock());
    for (int i = 0; i < threads_; ++i)
      if (fibers_[i].products.trace != fibers_[i / 128 * 128].products.trace ||
          (fibers_[i].products.trace && i / 128 * 128 + 128 > threads_))
        throw std::logic_error("the products of a warpgroup differ between its threads");
  }

  static BlockModel& running() { return *running_; }

  AskedCopies& copies() { return fibers_[threadIdx.x].copies; }
  bool copies_at_once() const { return order_ % 2 == 1; }
  PendingProducts& products() { return fibers_[threadIdx.x].products; }

  // Not from 0, as on the device.
  uint32_t address_of(const void* pointer) const {
    const ptrdiff_t offset = static_cast<const char*>(pointer) - memory_;
    if (offset < 0 || offset >= bytes_) throw std::out_of_range("a kernel left its shared memory");
    return kBase + static_cast<uint32_t>(offset);
  }
  // Of 16 bytes, as the tensor cores read them.
  const char* at(uint32_t address) const {
    if (address % 16 != 0)
      throw std::out_of_range("a kernel read 16 bytes of shared memory off their boundary");
    if (address < kBase || address - kBase + 16 > static_cast<uint32_t>(bytes_))
      throw std::out_of_range("a kernel left its shared memory");
    return memory_ + (address - kBase);
  }

  // All lanes of a warp.
  void meet(const char* name, void* argument, Complete complete) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    Meeting& meeting = meetings_[warp];
    if (meeting.arrived > 0 && (meeting.complete != complete || strcmp(meeting.name, name) != 0))
      throw std::logic_error(std::string("lanes of a warp are in ") + meeting.name + " and in " +
                             name + " or in one of another type");
    meeting.name = name;
    meeting.complete = complete;
    meeting.arguments[threadIdx.x % 32] = argument;
    if (++meeting.arrived < 32) return pause(name, warp, &meeting);
    meeting.arrived = 0;
    complete(meeting.arguments);
    for (int lane = 0; lane < 32; ++lane) set_ready(32 * warp + lane);
    resume_next();
  }

  // The barrier of all threads.
  void sync() {
    if (++arrived_ < threads_) return pause("barrier of the block ", 0, &arrived_);
    arrived_ = 0;
    wake(&arrived_);
    resume_next();
  }
  int threads() const { return threads_; }

  // Until another thread wakes those that wait for `object`.
  void pause(const char* name, int number, const void* object) {
    Fiber& self = fibers_[threadIdx.x];
    self.name = name;
    self.number = number;
    self.object = object;
    set_ready(static_cast<int>(threadIdx.x), false);
    resume_next();
  }
  void wake(const void* object) {
    for (int i = 0; i < threads_; ++i)
      if (!is_ready(i) && !fibers_[i].ended && fibers_[i].object == object) set_ready(i);
  }

 private:
  static constexpr size_t kStack = 128 * 1024;
  static constexpr uint32_t kBase = 1024;
  static constexpr uint64_t kUntouched = 0x5AFE57AC5AFE57AC;

  struct Fiber {
    ucontext_t context;
    PendingProducts products;
    AskedCopies copies;
    bool ended;
    const char* name;  // what it waits for
    int number;
    const void* object;
  };
  struct Meeting {
    const char* name;
    Complete complete;
    int arrived;
    void* arguments[32];
  };
  static void enter() {
    BlockModel& block = *running_;
    try {
      block.call_(block.body_);
      if (block.products().out || block.products().open)
        throw std::logic_error("a thread ended without waiting for its products");
      if (!block.copies().copies.empty())
        throw std::logic_error("a thread ended without waiting for its copies");
    } catch (...) {
      block.error_ = std::current_exception();
    }
    Fiber& self = block.fibers_[threadIdx.x];
    self.ended = true;
    ++block.ended_;
    block.set_ready(static_cast<int>(threadIdx.x), false);
    if (block.error_) swapcontext(&self.context, &block.caller_);
    block.resume_next();
  }

  char* stack_of(int thread) { return stacks_.get() + static_cast<size_t>(thread) * kStack; }

  // The threads that can run, in the order in which they are preferred.
  int place_of(int i) const { return order_ == 1 ? threads_ - 1 - i : i; }
  bool is_ready(int i) const { return ready_[place_of(i) / 64] >> place_of(i) % 64 & 1; }
  void set_ready(int i, bool ready = true) {
    const uint64_t bit = uint64_t{1} << place_of(i) % 64;
    uint64_t& bits = ready_[place_of(i) / 64];
    bits = ready ? bits | bit : bits & ~bit;
  }

  // The first that can run: in orders 0 and 1 some warps get as far ahead of the others as the
  // barriers let them. From 2 on the first place moves, at times after one step, at times after
  // thousands.
  int next() {
    if (order_ >= 2 && --steps_left_ <= 0) {
      random_ = (random_ + static_cast<uint64_t>(order_)) * 6364136223846793005u + 1;
      first_ = static_cast<int>((random_ >> 33) % static_cast<uint64_t>(threads_));
      steps_left_ = 1 << (random_ >> 60);
    }
    const int words = (threads_ + 63) / 64;
    for (int step = 0; step <= words; ++step) {
      const int word = (first_ / 64 + step) % words;
      const uint64_t bits = ready_[word] & (step == 0 ? ~uint64_t{0} << first_ % 64 : ~uint64_t{0});
      if (bits) return place_of(64 * word + __builtin_ctzll(bits));
    }
    return -1;
  }

  void resume_next() {
    const int self = static_cast<int>(threadIdx.x), other = next();
    if (memcmp(stack_of(self), &kUntouched, sizeof kUntouched) != 0) {
      error_ = std::make_exception_ptr(std::runtime_error("the stack of a thread is too small"));
      swapcontext(&fibers_[self].context, &caller_);
    }
    if (other == self) return;
    if (other >= 0) threadIdx.x = static_cast<unsigned>(other);
    swapcontext(&fibers_[self].context, other < 0 ? &caller_ : &fibers_[other].context);
  }

  std::string deadlock() const {
    std::string text = "deadlock:";
    int groups = 0;
    for (int i = 0, last; i < threads_ && groups < 8; i = last + 1) {
      const Fiber& fiber = fibers_[last = i];
      if (fiber.ended) continue;
      while (last + 1 < threads_ && !fibers_[last + 1].ended &&
             fibers_[last + 1].object == fiber.object && fibers_[last + 1].name == fiber.name)
        ++last;
      text += (groups++ ? ", " : " ") + std::to_string(i) + " to " + std::to_string(last) +
              " wait in " + fiber.name + std::to_string(fiber.number);
    }
    return text + "; " + std::to_string(ended_) + " of " + std::to_string(threads_) + " ended";
  }

  inline static thread_local BlockModel* running_ = nullptr;

  int threads_, order_;
  char* memory_;
  int bytes_;
  void (*call_)(const void*);
  const void* body_;
  std::vector<Fiber> fibers_;
  std::unique_ptr<char[]> stacks_;
  ucontext_t caller_{};
  std::exception_ptr error_;
  int ended_ = 0, first_ = 0, steps_left_ = 0;
  uint64_t random_ = 0, ready_[16] = {};
  Meeting meetings_[32] = {};
  int arrived_ = 0;
};

// Runs a block: `body` in each of its threads. Order 0 prefers the first threads, 1 the last, every
// other is a shuffle of its own.
template <class Body>
void run_block(int threads, int block_index, int grid, int order, char* memory, int bytes,
               const Body& body) {
  BlockModel block(
      threads, order, memory, bytes,
      [](const void* to_call) { (*static_cast<const Body*>(to_call))(); }, &body);
  threadIdx = {0, 0, 0};
  blockIdx = {static_cast<unsigned>(block_index), 0, 0};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(grid), 1, 1};
  block.run();
}

}  // namespace cuda
}  // namespace msvq
