// The machine behind executor.h: fibers, shared memory and its shadow, warps, barriers.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../../csrc/common/hardware.cuh"

namespace slm::executor {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr Shared kBase = 4096;  // where shared memory begins: 0 would hide absolute addresses
constexpr size_t kStack = 512 << 10;

using Clock = std::vector<uint32_t>;  // of each thread, how many of its events are known to lie in the past

void join(Clock& clock, const Clock& other) {
    for (size_t n = 0; n < clock.size(); ++n) clock[n] = std::max(clock[n], other[n]);
}

struct Copy {
    Shared to;
    const void* from;  // null: zeros
    int bytes;
};

struct Thread {
    int id;
    Clock clock;
    std::vector<std::vector<Copy>> groups{1};  // asynchronous copies; the last group is not committed yet
    const uint64_t* awaited = nullptr;  // waits until *awaited != seen
    uint64_t seen = 0;
    const char* waits_for = "";
    bool done = false;
    char* stack;
    ucontext_t start;
    jmp_buf state;
    bool started = false;
};

// Two bytes of memory: the last write, and the reads since.
struct Cell {
    enum State : uint8_t { unwritten, pending, written, counted } state = unwritten;  // counted: by atomics
    int writer = -1;
    uint32_t clock = 0;
    int block = 0;
    uint32_t reads = 0;  // a list of Read, 0 for none
};
struct Read {
    int thread;
    uint32_t clock, next;
};

struct Gathering {  // of threads that wait for one another
    const char* what = nullptr;
    int arrived = 0;
    uint64_t times = 0;
    Clock clock;
    void* lanes[kWarp];
};

struct Block {
    std::vector<Thread> threads;
    std::vector<char> memory;
    std::vector<Cell> cells;
    std::vector<Read> reads;
    std::vector<Gathering> warps, warp_syncs;
    Gathering barriers[16];
};

Block* block;
Thread* self;
jmp_buf scheduler;
const std::function<void()>* body;
std::string error;
std::map<const char*, int64_t> known;
std::unordered_map<uintptr_t, Cell> global;  // what this launch has written
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

__attribute__((noinline)) void wait(const uint64_t& counter, uint64_t seen, const char* what) {
    self->awaited = &counter, self->seen = seen, self->waits_for = what;
    if (_setjmp(self->state) == 0) _longjmp(scheduler, 1);
    self->awaited = nullptr;
}

__attribute__((noinline)) void begin(Thread& thread, int id, int threads) {
    thread.id = id;
    thread.clock.assign(size_t(threads), 0);
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
    now.cells.resize(now.memory.size() / 2);
    now.reads.push_back({});
    now.warps.resize(size_t(threads / kWarp));
    now.warp_syncs.resize(size_t(threads / kWarp));
    for (auto* gatherings : {&now.warps, &now.warp_syncs})
        for (Gathering& g : *gatherings) g.clock.resize(size_t(threads));
    for (Gathering& g : now.barriers) g.clock.resize(size_t(threads));
    for (int t = 0; t < threads; ++t) begin(now.threads[size_t(t)], t, threads);
    for (int running = threads; running > 0;) {
        bool moved = false;
        for (Thread& thread : now.threads) {
            if (thread.done || (thread.awaited != nullptr && *thread.awaited == thread.seen)) continue;
            moved = true;
            resume(thread);
            if (!error.empty()) return;
            running -= thread.done;
        }
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
}

// --- The shadow of memory

bool in_the_past(int thread, uint32_t clock) {
    return thread == self->id || clock <= self->clock[size_t(thread)];
}

std::vector<Cell>::iterator cells_at(Shared address, int bytes, const char* what) {
    if (address % unsigned(bytes) != 0)
        fail("%s of %d bytes at shared address %u: misaligned", what, bytes, address);
    if (address < kBase || address + unsigned(bytes) > kBase + block->memory.size())
        fail("%s at byte %d of %zu of shared memory: out of bounds", what, int(address) - int(kBase),
             block->memory.size());
    return block->cells.begin() + (address - kBase) / 2;
}

char* bytes_at(Shared address) { return block->memory.data() + (address - kBase); }

void note_read(Cell& cell, Shared address) {
    if (cell.state == Cell::unwritten)
        fail("read at byte %u of shared memory, which nobody has written", address - kBase);
    if (cell.state == Cell::pending)
        fail("read at byte %u of shared memory before the copy of thread %d was waited for", address - kBase,
             cell.writer);
    if (!in_the_past(cell.writer, cell.clock))
        fail("read at byte %u of shared memory, written by thread %d: no barrier between", address - kBase,
             cell.writer);
    const uint32_t now = self->clock[size_t(self->id)];
    for (uint32_t r = cell.reads; r != 0; r = block->reads[r].next)
        if (block->reads[r].thread == self->id) {
            block->reads[r].clock = now;
            return;
        }
    block->reads.push_back({self->id, now, cell.reads});
    cell.reads = uint32_t(block->reads.size() - 1);
}

void note_write(Cell& cell, Shared address, Cell::State state) {
    if (cell.state == Cell::pending)
        fail("write at byte %u of shared memory, where a copy of thread %d has not been waited for",
             address - kBase, cell.writer);
    if (cell.state != Cell::unwritten && !in_the_past(cell.writer, cell.clock))
        fail("write at byte %u of shared memory, written by thread %d: no barrier between", address - kBase,
             cell.writer);
    for (uint32_t r = cell.reads; r != 0; r = block->reads[r].next)
        if (!in_the_past(block->reads[r].thread, block->reads[r].clock))
            fail("write at byte %u of shared memory, read by thread %d: no barrier between", address - kBase,
                 block->reads[r].thread);
    cell = {state, self->id, self->clock[size_t(self->id)], 0, 0};
}

void check_global(const void* address, int bytes, const char* what) {
    const char* data = static_cast<const char*>(address);
    auto next = known.upper_bound(data);
    bool inside = next != known.begin();
    if (inside) {
        --next;
        inside = data + bytes <= next->first + next->second;
    }
    if (!inside) fail("%s of %d bytes of global memory outside every tensor", what, bytes);
    if (reinterpret_cast<uintptr_t>(data) % unsigned(bytes) != 0)
        fail("%s of %d bytes of global memory: misaligned", what, bytes);
}

int number_of_block() {
    return int(block_index.x + grid_size.x * (block_index.y + grid_size.y * block_index.z));
}

// Is what is there, if this launch wrote it, this block's and in the past?
void check_writer(const void* address, int bytes, const char* what) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(address) / 2;
    for (uintptr_t at = first; at < first + uintptr_t(bytes + 1) / 2; ++at) {
        const auto found = global.find(at);
        if (found == global.end()) continue;
        const Cell& cell = found->second;
        if (cell.block != number_of_block())
            fail("%s of global memory that block %d of the same launch writes", what, cell.block);
        if (!in_the_past(cell.writer, cell.clock))
            fail("%s of global memory that thread %d writes: no barrier between", what, cell.writer);
    }
}

// --- Threads that wait for one another

// One more has come. The last of `expected` lets all of them go on.
void gather(Gathering& g, int expected, const char* what, bool wait_for_all) {
    if (g.arrived > 0 && g.what != what) fail("%s, where others call %s", what, g.what);
    g.what = what;
    join(g.clock, self->clock);
    ++self->clock[size_t(self->id)];
    const uint64_t seen = g.times;
    if (++g.arrived == expected) {
        g.arrived = 0;
        ++g.times;
    } else if (wait_for_all) {
        wait(g.times, seen, what);
    }
    if (wait_for_all) join(self->clock, g.clock);
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

void know(const void* data, int64_t bytes) {
    int64_t& size = known[static_cast<const char*>(data)];
    size = std::max(size, bytes);
}

int architecture() {
    const char* wanted = std::getenv("SLM_EXECUTOR_ARCHITECTURE");
    return wanted != nullptr ? std::atoi(wanted) : 80;
}

void run_grid(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
    STD_TORCH_CHECK(threads > 0 && threads <= 1024 && threads % kWarp == 0, "launch: ", threads, " threads");
    body = &kernel;
    grid_size = grid, block_size = dim3(unsigned(threads));
    error.clear();
    global.clear();
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = {x, y, z};
                run_block(threads, shared_bytes);
                STD_TORCH_CHECK(error.empty(), "CUDA on a CPU: ", error);
            }
}

const void* read_shared(Shared address, int bytes) {
    auto cell = cells_at(address, bytes, "read");
    for (int n = 0; n < bytes; n += 2) note_read(*cell++, address + unsigned(n));
    return bytes_at(address);
}

void write_shared(Shared address, const void* from, int bytes) {
    auto cell = cells_at(address, bytes, "write");
    for (int n = 0; n < bytes; n += 2) note_write(*cell++, address + unsigned(n), Cell::written);
    std::memcpy(bytes_at(address), from, size_t(bytes));
}

void read_global(const void* address, int bytes) {
    check_global(address, bytes, "read");
    check_writer(address, bytes, "read");
}

void write_global(const void* address, int bytes) {
    check_global(address, bytes, "write");
    check_writer(address, bytes, "write");
    const uintptr_t first = reinterpret_cast<uintptr_t>(address) / 2;
    for (uintptr_t at = first; at < first + uintptr_t(bytes + 1) / 2; ++at)
        global[at] = {Cell::written, self->id, self->clock[size_t(self->id)], number_of_block(), 0};
}

void together(const char* what, void* mine, const std::function<void(void* const*)>& all) {
    Gathering& warp = block->warps[size_t(self->id / kWarp)];
    if (warp.arrived > 0 && std::strcmp(warp.what, what) != 0)
        fail("%s, where other lanes of the warp call %s", what, warp.what);
    warp.what = what;
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
    auto cell = cells_at(to, bytes, "asynchronous copy");
    for (int n = 0; n < bytes; n += 2) note_write(*cell++, to + unsigned(n), Cell::pending);
    self->groups.back().push_back({to, from, bytes});
}
}  // namespace

void copy_async(Shared to, const void* from, bool valid) { begin_copy(to, valid ? from : nullptr, 16); }
void copy_async_8(Shared to, const void* from, bool valid) { begin_copy(to, valid ? from : nullptr, 8); }

void commit_copies() { self->groups.emplace_back(); }

void wait_for_copies(int newest) {
    auto& groups = self->groups;
    while (int(groups.size()) - 1 > newest) {
        for (const Copy& copy : groups.front()) {
            auto cell = cells_at(copy.to, copy.bytes, "asynchronous copy");
            for (int n = 0; n < copy.bytes; n += 2, ++cell)
                *cell = {Cell::written, self->id, self->clock[size_t(self->id)], 0, 0};
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
void check_barrier(int barrier, int threads) {
    if (barrier < 1 || barrier > 15) fail("barrier is %d; expected 1 to 15", barrier);
    if (threads < kWarp || threads % kWarp != 0 || threads > int(block_size.x))
        fail("a barrier of %d threads", threads);
}
}  // namespace

void sync_some(int barrier, int threads) {
    check_barrier(barrier, threads);
    gather(block->barriers[barrier], threads, "barrier", true);
}
void arrive_some(int barrier, int threads) {
    check_barrier(barrier, threads);
    gather(block->barriers[barrier], threads, "barrier", false);
}

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
int atomic_add(int* address, int x) {
    check_global(address, 4, "atomic");
    const int before = *address;
    *address += x;
    return before;
}

int atomic_add(Shared address, int x) {
    auto cell = cells_at(address, 4, "atomic");
    for (int n = 0; n < 4; n += 2, ++cell) {
        if (cell->state == Cell::unwritten)
            fail("atomic at byte %u of shared memory, which nobody has written", address - kBase);
        if (cell->state == Cell::counted)
            *cell = {Cell::counted, self->id, self->clock[size_t(self->id)], 0, cell->reads};
        else
            note_write(*cell, address, Cell::counted);
    }
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

uint32_t as_tf32(float x) {  // to nearest, ties away from 0; the 13 low bits are not used
    return std::isfinite(x) ? (as_bits(x) + 0x1000) & ~0x1fffu : as_bits(x);
}

// --- Tensor cores. Fragments as the PTX ISA draws them, matrices as plain arrays between.

namespace {

struct Matrices {
    Shared row;
    uint32_t* r;
    bool transposed;
};

void gather_matrices(const char* what, Matrices mine) {
    read_shared(mine.row, 16);  // each lane answers for the row whose address it gives
    together(what, &mine, [](void* const* of_lane) {
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
    });
}

struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

// d += a b of a warp. `unpack(register, half)` gives a number; K numbers of a row, `pair` of them a register.
template <int K, int pair, typename Unpack>
void product(const char* what, Product mine, Unpack unpack) {
    together(what, &mine, [unpack](void* const* of_lane) {
        float a[16][K], b[K][8];
        for (int l = 0; l < kWarp; ++l) {
            const Product& lane = *static_cast<Product*>(of_lane[l]);
            const int g = l / 4, t = l % 4;
            for (int half = 0; half < pair; ++half)
                for (int high = 0; high < 2; ++high) {
                    const int k = pair * t + half + high * K / 2;
                    a[g][k] = unpack(lane.a[2 * high], half);
                    a[g + 8][k] = unpack(lane.a[2 * high + 1], half);
                    b[k][g] = unpack(lane.b[high], half);
                }
        }
        for (int l = 0; l < kWarp; ++l) {
            const Product& lane = *static_cast<Product*>(of_lane[l]);
            for (int n = 0; n < 4; ++n) {
                float sum = 0;
                for (int k = 0; k < K; ++k) sum += a[l / 4 + n / 2 * 8][k] * b[k][2 * (l % 4) + n % 2];
                lane.d[n] += sum;
            }
        }
    });
}

}  // namespace

void load_matrices(uint32_t (&r)[4], Shared row) { gather_matrices("load_matrices", {row, r, false}); }
void load_matrices_transposed(uint32_t (&r)[4], Shared row) {
    gather_matrices("load_matrices_transposed", {row, r, true});
}

template <>
void multiply<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    product<16, 2>("multiply", {d, a, {b0, b1}},
                   [](uint32_t x, int half) { return to_float(BFloat16{uint16_t(x >> 16 * half)}); });
}
template <>
void multiply<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    product<16, 2>("multiply", {d, a, {b0, b1}},
                   [](uint32_t x, int half) { return to_float(Half{uint16_t(x >> 16 * half)}); });
}
void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    product<8, 1>("multiply_tf32", {d, a, {b0, b1}}, [](uint32_t x, int) { return as_float(x & ~0x1fffu); });
}

Device::~Device() { known.clear(); }

}  // namespace slm

extern "C" __attribute__((visibility("default"))) int64_t slm_executor_take_conflicts() {
    const int64_t now = slm::executor::conflicts;
    slm::executor::conflicts = 0;
    return now;
}
