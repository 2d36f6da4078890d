// The machine behind executor.h: fibers, shared memory and its shadow, warps, barriers.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <unordered_map>

#include "machine.h"

namespace slm::executor {

dim3 thread_index, block_index, block_size, grid_size;
Block* block;
Thread* self;
std::string error;
int number;

namespace {

constexpr size_t kStack = 512 << 10;

jmp_buf scheduler;
const std::function<void()>* body;
bool reversed;  // the order of threads and blocks
std::unordered_map<const void*, Clocks> released;  // what atomics at a place have behind them
int devices;  // alive
int64_t conflicts;  // rows of ldmatrix beyond the first in the same banks

// One stack a thread, kept from launch to launch, with a page that may not be touched below it.
char* stack_of(size_t thread) {
    static std::vector<char*> stacks;
    while (stacks.size() <= thread) {
        char* memory = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        STD_TORCH_CHECK(memory != MAP_FAILED && mprotect(memory, 4096, PROT_NONE) == 0,
                        "no memory for stacks");
        stacks.push_back(memory);
    }
    return stacks[thread];
}

void fiber() {
    (*body)();
    for (const auto& group : self->groups)
        if (!group.empty()) fail("the thread ends before its asynchronous copies were waited for");
    end_thread_of_hopper();
    self->done = true;
    _longjmp(scheduler, 1);
}

// Runs a thread until it waits or ends.
__attribute__((noinline)) void resume(Thread& thread) {
    self = &thread;
    thread_index = dim3(unsigned(thread.id), 0, 0);
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.state, 1);
    thread.started = true;
    setcontext(&thread.start);
}

}  // namespace

__attribute__((noinline)) void wait(const uint64_t& counter, uint64_t seen, const char* what) {
    self->awaited = &counter, self->seen = seen, self->waits_for = what;
    if (_setjmp(self->state) == 0) _longjmp(scheduler, 1);
    self->awaited = nullptr;
}

namespace {

__attribute__((noinline)) void begin(Thread& thread, int id) {
    thread.id = id;
    thread.clock = block->no_events();
    thread.clock[size_t(id)] = 1;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack_of(size_t(id));
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, fiber, 0);
}

void run_block(int threads, int shared_bytes) {
    Block now;
    block = &now;
    now.threads.resize(size_t(threads));
    now.memory.assign(size_t(shared_bytes + 15) / 16 * 16, char(0xff));  // NaN
    now.shadow.resize(now.memory.size() / 2);
    now.warps.resize(size_t(threads / kWarp));
    now.warp_syncs.resize(size_t(threads / kWarp));
    now.agents = architecture() < 90 ? 0 : kMbarriers + threads / kWarp;
    for (auto* gatherings : {&now.warps, &now.warp_syncs})
        for (Gathering& g : *gatherings) g.clock = now.no_events();
    for (Gathering& g : now.barriers) g.clock = now.no_events();
    for (int t = 0; t < threads; ++t) begin(now.threads[size_t(t)], t);
    for (int running = threads; running > 0;) {
        bool moved = false;
        for (int t = 0; t < threads; ++t) {
            Thread& thread = now.threads[size_t(reversed ? threads - 1 - t : t)];
            if (thread.done || (thread.awaited != nullptr && *thread.awaited == thread.seen)) continue;
            moved = true;
            resume(thread);
            if (!error.empty()) return;
            running -= thread.done;
        }
        if (!moved && deliver_a_box()) continue;
        if (!error.empty()) return;
        if (!moved) {
            for (const Thread& thread : now.threads)
                if (!thread.done) {
                    self = nullptr;
                    error = "thread " + std::to_string(thread.id) + " and others wait for ever at a " +
                            thread.waits_for + " that not all reach";
                    return;
                }
        }
    }
    error = end_block_of_hopper();
}

}  // namespace

namespace {

// --- Threads that wait for one another

// One more has come. The last of `expected` lets all of them go on, each knowing what those who came knew.
void gather(Gathering& g, int expected, const char* what, bool wait_for_all) {
    if (g.arrived > 0 && g.expected != expected)
        fail("a %s of %d threads, where others expect %d", what, expected, g.expected);
    g.expected = expected;
    join(g.clock, self->clock), join(g.others, self->others);
    ++self->clock[size_t(self->id)];
    if (wait_for_all) g.waiting.push_back(self);
    const uint64_t seen = g.times;
    if (++g.arrived < expected) {
        if (wait_for_all) wait(g.times, seen, what);
        return;
    }
    for (Thread* thread : g.waiting) join(thread->clock, g.clock), join(thread->others, g.others);
    std::fill(g.clock.begin(), g.clock.end(), 0);
    g.others.clear(), g.waiting.clear();
    g.arrived = 0;
    ++g.times;
}

}  // namespace

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    error = "block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
            std::to_string(block_index.z) + "), thread " + std::to_string(self->id) + ": " + text;
    _longjmp(scheduler, 1);
}

int architecture() {
    const char* wanted = std::getenv("SLM_EXECUTOR_ARCHITECTURE");
    return wanted != nullptr ? std::atoi(wanted) : 80;
}

int shared_limit() {  // CUDA C++ Programming Guide, table of compute capabilities
    const int number = architecture();
    if (number == 80 || number == 87) return 163 * 1024;
    return (number >= 90 && number < 120 ? 227 : 99) * 1024;
}

void run_grid(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
    STD_TORCH_CHECK(threads > 0 && threads <= 1024 && threads % kWarp == 0, "launch: ", threads, " threads");
    body = &kernel;
    grid_size = grid, block_size = dim3(unsigned(threads));
    const char* order = std::getenv("SLM_EXECUTOR_ORDER");
    reversed = order != nullptr && std::strcmp(order, "reverse") == 0;
    error.clear();
    forget_global();
    released.clear();
    const int blocks = int(grid.x * grid.y * grid.z);
    for (int n = 0; n < blocks; ++n) {
        number = reversed ? blocks - 1 - n : n;
        block_index = {unsigned(number) % grid.x, unsigned(number) / grid.x % grid.y,
                       unsigned(number) / grid.x / grid.y};
        run_block(threads, shared_bytes);
        STD_TORCH_CHECK(error.empty(), "CUDA on a CPU: ", error);
    }
}

void together(const char* what, void* mine, const std::function<void(void* const*)>& all, int which) {
    Gathering& warp = block->warps[size_t(self->id / kWarp)];
    if (warp.arrived > 0 && ((warp.what != what && std::strcmp(warp.what, what) != 0) || warp.which != which))
        fail("%s (%d), where other lanes of the warp call %s (%d)", what, which, warp.what, warp.which);
    warp.what = what, warp.which = which;
    warp.lanes[self->id % kWarp] = mine;
    const uint64_t seen = warp.times;
    if (++warp.arrived < kWarp) return wait(warp.times, seen, what);
    all(warp.lanes);
    warp.arrived = 0;
    ++warp.times;
}

}  // namespace slm::executor

namespace slm {

using namespace executor;

Shared shared_memory() { return kBase; }

// --- Asynchronous copies: written to memory by the wait, no sooner

namespace {
void begin_copy(Shared to, const void* from, int bytes) {
    if (from != nullptr) read_global(from, bytes);
    const Copy copy{to, from, bytes};
    Cell* const cells = &note_shared(to, bytes, writing);
    for (int n = 0; n < copy.cells(); ++n) cells[n].state = Cell::pending;
    self->groups.back().push_back(copy);
}
}  // namespace

void copy_async(Shared to, const void* from, bool valid) { begin_copy(to, valid ? from : nullptr, 16); }
void copy_async_8(Shared to, const void* from, bool valid) { begin_copy(to, valid ? from : nullptr, 8); }

void commit_copies() { self->groups.emplace_back(); }

void wait_for_copies(int newest) {
    auto& groups = self->groups;
    while (int(groups.size()) - 1 > newest) {
        for (const Copy& copy : groups.front()) {
            Cell* const cells = &block->shadow.cells[(copy.to - kBase) / 2];
            for (int n = 0; n < copy.cells(); ++n)
                cells[n].state = Cell::written, cells[n].clock = self->clock[size_t(self->id)];
            if (copy.from != nullptr) read_global(copy.from, copy.bytes);  // not before
            if (copy.from != nullptr)
                std::memcpy(bytes_at(copy.to), copy.from, size_t(copy.bytes));
            else
                std::memset(bytes_at(copy.to), 0, size_t(copy.bytes));
        }
        groups.erase(groups.begin());
    }
}

// --- Barriers

void sync_block() { gather(block->barriers[0], int(block_size.x), "sync_block", true); }
void sync_warp() { gather(block->warp_syncs[size_t(self->id / kWarp)], kWarp, "sync_warp", true); }

namespace {
// Warps come to a barrier as a whole.
void gather_some(const char* what, int barrier, int threads, bool wait_for_all) {
    if (barrier < 1 || barrier > 15) fail("barrier is %d; expected 1 to 15", barrier);
    if (threads < kWarp || threads % kWarp != 0 || threads > int(block_size.x))
        fail("a barrier of %d threads", threads);
    together(what, nullptr, [](void* const*) {}, barrier);
    gather(block->barriers[barrier], threads, "barrier", wait_for_all);
}
}  // namespace

void sync_some(int barrier, int threads) { gather_some("sync_some", barrier, threads, true); }
void arrive_some(int barrier, int threads) { gather_some("arrive_some", barrier, threads, false); }

// --- Warps

namespace {
struct Vote {
    uint32_t x, result;
};
}  // namespace

uint32_t ballot(bool x) {
    Vote vote{x, 0};
    together("ballot", &vote, [](void* const* of_lane) {
        uint32_t bits = 0;
        for (int l = 0; l < kWarp; ++l) bits |= static_cast<Vote*>(of_lane[l])->x << l;
        for (int l = 0; l < kWarp; ++l) static_cast<Vote*>(of_lane[l])->result = bits;
    });
    return vote.result;
}

uint32_t match(uint32_t x) {
    Vote vote{x, 0};
    together("match", &vote, [](void* const* of_lane) {
        for (int l = 0; l < kWarp; ++l)
            for (int m = 0; m < kWarp; ++m) {
                Vote& mine = *static_cast<Vote*>(of_lane[l]);
                mine.result |= uint32_t(mine.x == static_cast<Vote*>(of_lane[m])->x) << m;
            }
    });
    return vote.result;
}

// Atomics on one place do not race with one another; with plain uses they do, unless a barrier lies between.
namespace {
template <typename X>
X add_to_global(X* address, X x) {
    add_global(address, sizeof(X));
    Clocks& behind = released[address];
    join(self->received, behind);
    join(behind, self->fenced);
    const X before = *address;
    *address += x;
    return before;
}
}  // namespace

int atomic_add(int* address, int x) { return add_to_global(address, x); }
int64_t atomic_add(int64_t* address, int64_t x) { return add_to_global(address, x); }

int64_t load_relaxed(const int64_t* address) {
    add_global(address, 8);
    return *address;
}

void fence() {
    join(self->others, self->received);
    self->fenced = self->others;
    self->fenced[number] = self->clock;
    ++self->clock[size_t(self->id)];
}

int atomic_add(Shared address, int x) {
    note_shared(address, 4, adding);
    int before;
    std::memcpy(&before, bytes_at(address), 4);
    const int after = before + x;
    std::memcpy(bytes_at(address), &after, 4);
    return before;
}

// --- Numbers

float to_float(Half x) {
    _Float16 y;
    std::memcpy(&y, &x.bits, 2);
    return float(y);
}

template <>
uint16_t round_to<BFloat16>(float x) {
    const uint32_t bits = as_bits(x);
    if (std::isnan(x)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <>
uint16_t round_to<Half>(float x) {
    const _Float16 y = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &y, 2);
    return bits;
}

// --- Tensor cores. Fragments as the PTX ISA draws them, matrices as plain arrays between.

namespace {

struct Matrices {
    Shared row;
    uint32_t* r;
    bool transposed;
};

void gather_matrices(const char* what, Matrices mine, int line) {
    read_shared(mine.row, 16);  // each lane answers for the row whose address it gives
    together(
        what, &mine,
        [](void* const* of_lane) {
            for (int m = 0; m < 4; ++m) {
                uint16_t matrix[8][8];
                std::vector<Shared> rows;
                for (int row = 0; row < 8; ++row) {
                    const Shared address = static_cast<Matrices*>(of_lane[8 * m + row])->row;
                    std::memcpy(matrix[row], bytes_at(address), 16);
                    for (const Shared other : rows)
                        if (other != address && other / 16 % 8 == address / 16 % 8) {
                            ++conflicts;
                            break;
                        }
                    rows.push_back(address);
                }
                for (int l = 0; l < kWarp; ++l) {
                    const Matrices& lane = *static_cast<Matrices*>(of_lane[l]);
                    const int i = l / 4, j = 2 * (l % 4);
                    const uint16_t first = lane.transposed ? matrix[j][i] : matrix[i][j];
                    const uint16_t second = lane.transposed ? matrix[j + 1][i] : matrix[i][j + 1];
                    lane.r[m] = first | uint32_t(second) << 16;
                }
            }
        },
        line);
}

struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

}  // namespace

void load_matrices(uint32_t (&r)[4], Shared row, int line) {
    gather_matrices("load_matrices", {row, r, false}, line);
}
void load_matrices_transposed(uint32_t (&r)[4], Shared row, int line) {
    gather_matrices("load_matrices_transposed", {row, r, true}, line);
}

template <typename E>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
    Product mine{d, a, {b0, b1}};
    together(
        "multiply", &mine,
        [](void* const* of_lane) {
            constexpr int K = 16;
            float a[16][K], b[K][8];
            for (int l = 0; l < kWarp; ++l) {
                const Product& lane = *static_cast<Product*>(of_lane[l]);
                const int g = l / 4, t = l % 4;
                for (int half = 0; half < 2; ++half)
                    for (int high = 0; high < 2; ++high) {
                        const int k = 2 * t + half + high * K / 2;
                        const auto unpack = half == 0 ? first_of<E> : second_of<E>;
                        a[g][k] = unpack(lane.a[2 * high]);
                        a[g + 8][k] = unpack(lane.a[2 * high + 1]);
                        b[k][g] = unpack(lane.b[high]);
                    }
            }
            float d[16][8] = {};
            for (int i = 0; i < 16; ++i)
                for (int k = 0; k < K; ++k)
                    for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
            for (int l = 0; l < kWarp; ++l)
                for (int n = 0; n < 4; ++n)
                    static_cast<Product*>(of_lane[l])->d[n] += d[l / 4 + n / 2 * 8][2 * (l % 4) + n % 2];
        },
        line);
}
template void multiply<BFloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, int);
template void multiply<Half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, int);

Device::Device(const torch::stable::Tensor&) { ++devices; }
Device::~Device() {
    if (--devices == 0) forget_views();
}

}  // namespace slm

extern "C" __attribute__((visibility("default"))) int64_t slm_executor_take_conflicts() {
    const int64_t now = slm::executor::conflicts;
    slm::executor::conflicts = 0;
    return now;
}
