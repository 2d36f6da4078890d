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

namespace {

constexpr size_t kStack = 512 << 10;

jmp_buf scheduler;
const std::function<void()>* body;
int number;  // of the block
bool reversed;  // the order of threads and blocks
std::vector<View> views;
std::unordered_map<uintptr_t, Shadow> pages;  // of global memory, as this launch uses it
Uses global_uses;
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

// --- The shadow of memory

bool in_the_past(int thread, uint32_t clock) {
    return thread == self->id || clock <= self->clock[size_t(thread)];
}

namespace {

size_t cell_at(Shared address, int bytes, const char* what) {
    if (address % unsigned(bytes) != 0)
        fail("%s of %d bytes at shared address %u: misaligned", what, bytes, address);
    if (address < kBase || address + unsigned(bytes) > kBase + block->memory.size())
        fail("%s at byte %d of %zu of shared memory: out of bounds", what, int(address) - int(kBase),
             block->memory.size());
    return (address - kBase) / 2;
}

void split(Shadow& shadow, Uses& uses, size_t piece) {
    if (!shadow.whole[piece]) return;
    shadow.whole[piece] = false;
    Cell* const cells = &shadow.cells[8 * piece];
    for (int n = 1; n < 8; ++n) {
        cells[n] = cells[0], cells[n].uses = 0;
        for (uint32_t u = cells[0].uses; u != 0; u = uses.all[u].next) uses.add(cells[n], uses.all[u]);
    }
}

}  // namespace

std::vector<Cell>::iterator cells_at(Shared address, int bytes, const char* what) {
    const size_t first = cell_at(address, bytes, what);
    split(block->shadow, block->uses, first / 8);
    return block->shadow.cells.begin() + std::ptrdiff_t(first);
}

char* bytes_at(Shared address) { return block->memory.data() + (address - kBase); }

void Uses::add(Cell& cell, Use use) {
    uint32_t place = spare;
    if (place != 0)
        spare = all[place].next;
    else
        place = uint32_t(all.size()), all.emplace_back();
    all[place] = use;
    all[place].next = cell.uses;
    cell.uses = place;
}

void add_read(Cell& cell, int agent, uint32_t clock) {
    for (uint32_t u = cell.uses; u != 0; u = block->uses.all[u].next)
        if (block->uses.all[u].agent == agent) {
            block->uses.all[u].clock = clock;
            return;
        }
    block->uses.add(cell, {agent, clock, number, false, 0});
}

namespace {

enum Kind { reading, writing, adding };
const char* const kDoes[] = {"read", "write", "atomic"};
const char* const kDid[] = {"reads", "writes", "adds to"};

bool in_the_past(int of_block, int agent, uint32_t clock) {
    if (of_block == number) return executor::in_the_past(agent, clock);
    const auto known = self->others.find(of_block);
    return known != self->others.end() && clock <= known->second[size_t(agent)];
}

[[noreturn]] void conflict(Kind now, Kind then, int of_block, int agent, Shared address) {
    char place[48] = "of global memory";
    if (address != 0) snprintf(place, sizeof(place), "at byte %u of shared memory", address - kBase);
    if (of_block != number)
        fail("%s %s that block %d of the same launch %s", kDoes[now], place, of_block, kDid[then]);
    fail("%s %s that thread %d %s: no barrier between", kDoes[now], place, agent, kDid[then]);
}

// Notes a use of a cell, unless an earlier one conflicts and nothing orders the two. What lies in the past of this
// use is forgotten, where whatever conflicts with it conflicts with this one as well.
void note(Uses& uses, Cell& cell, Kind kind, Shared address) {
    if (cell.state == Cell::pending)
        fail("%s at byte %u of shared memory before the copy of thread %d was waited for", kDoes[kind],
             address - kBase, cell.writer);
    if (address != 0 && cell.state == Cell::unwritten && kind != writing)
        fail("%s at byte %u of shared memory, which nobody has written", kDoes[kind], address - kBase);
    if (cell.writer >= 0 && !in_the_past(cell.block, cell.writer, cell.clock))
        conflict(kind, writing, cell.block, cell.writer, address);
    for (uint32_t* link = &cell.uses; *link != 0;) {
        const uint32_t place = *link;
        Use& use = uses.all[place];
        const bool alike = kind != writing && use.adds == (kind == adding);
        const bool past = in_the_past(use.block, use.agent, use.clock);
        if (!past && !alike) conflict(kind, use.adds ? adding : reading, use.block, use.agent, address);
        if (past && (alike || kind == writing))
            *link = use.next, use.next = uses.spare, uses.spare = place;
        else
            link = &use.next;
    }
    const uint32_t now = self->clock[size_t(self->id)];
    if (kind == writing)
        cell = {Cell::written, self->id, now, number, 0};
    else
        uses.add(cell, {self->id, now, number, kind == adding, 0});
}

// The same of some bytes, at `first` of a shadow.
void note(Shadow& shadow, Uses& uses, size_t first, int bytes, Kind kind, Shared address) {
    if (bytes == 16 && shadow.whole[first / 8]) return note(uses, shadow.cells[first], kind, address);
    split(shadow, uses, first / 8);
    for (int n = 0; n < bytes; n += 2)
        note(uses, shadow.cells[first++], kind, address == 0 ? 0 : address + unsigned(n));
    if (bytes == 16 && kind == writing) shadow.whole[(first - 1) / 8] = true;
}

Cell& note_shared(Shared address, int bytes, Kind kind) {
    const size_t first = cell_at(address, bytes, kDoes[kind]);
    note(block->shadow, block->uses, first, bytes, kind, address);
    return block->shadow.cells[first];
}

}  // namespace

void note_write(Cell& cell, Shared address, Cell::State state) {
    note(block->uses, cell, writing, address);
    cell.state = state;
}

bool View::holds(const char* address, int64_t bytes) const {
    int64_t offset = address - data;
    if (offset < 0 || offset + bytes > extent) return false;
    for (const auto& [stride, size] : steps) offset -= std::min(offset / stride, size - 1) * stride;
    return offset + bytes <= run;
}

void check_global(const void* address, int bytes, const char* what) {
    const char* data = static_cast<const char*>(address);
    static size_t last = 0;  // the view that held the last address
    if (last >= views.size() || !views[last].holds(data, bytes)) {
        last = 0;
        while (last < views.size() && !views[last].holds(data, bytes)) ++last;
        if (last == views.size()) fail("%s of %d bytes of global memory outside every tensor", what, bytes);
    }
    if (reinterpret_cast<uintptr_t>(data) % unsigned(bytes) != 0)
        fail("%s of %d bytes of global memory: misaligned", what, bytes);
}

namespace {

void note_global(const void* address, int bytes, Kind kind) {
    check_global(address, bytes, kDoes[kind]);
    constexpr uintptr_t kPage = 512;  // cells
    const uintptr_t first = reinterpret_cast<uintptr_t>(address) / 2;
    Shadow& page = pages[first / kPage];  // an aligned access lies in one
    if (page.cells.empty()) page.resize(kPage);
    note(page, global_uses, first % kPage, bytes, kind, 0);
}

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

View view(const torch::stable::Tensor& x) {
    const int64_t bytes = int64_t(x.element_size());
    View view{static_cast<const char*>(x.data_ptr()), bytes, bytes, {}};
    for (int64_t d = 0; d < x.dim(); ++d)
        if (x.size(d) > 1 && x.stride(d) > 0) view.steps.emplace_back(x.stride(d) * bytes, x.size(d));
    std::sort(view.steps.rbegin(), view.steps.rend());
    for (const auto& [stride, size] : view.steps) view.extent += stride * (size - 1);
    while (!view.steps.empty() && view.steps.back().first == view.run) {
        view.run *= view.steps.back().second;
        view.steps.pop_back();
    }
    return view;
}

void know(View view) { views.push_back(std::move(view)); }

int architecture() {
    const char* wanted = std::getenv("SLM_EXECUTOR_ARCHITECTURE");
    return wanted != nullptr ? std::atoi(wanted) : 80;
}

void run_grid(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
    STD_TORCH_CHECK(threads > 0 && threads <= 1024 && threads % kWarp == 0, "launch: ", threads, " threads");
    body = &kernel;
    grid_size = grid, block_size = dim3(unsigned(threads));
    const char* order = std::getenv("SLM_EXECUTOR_ORDER");
    reversed = order != nullptr && std::strcmp(order, "reverse") == 0;
    error.clear();
    pages.clear(), global_uses = {};
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

const void* read_shared(Shared address, int bytes) {
    note_shared(address, bytes, reading);
    return bytes_at(address);
}

void write_shared(Shared address, const void* from, int bytes) {
    note_shared(address, bytes, writing);
    std::memcpy(bytes_at(address), from, size_t(bytes));
}

void read_global(const void* address, int bytes) { note_global(address, bytes, reading); }
void write_global(const void* address, int bytes) { note_global(address, bytes, writing); }

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

void copy_async(Shared to, const void* from, bool valid) {
    if (valid) read_global(from, 16);
    note_shared(to, 16, writing).state = Cell::pending;
    self->groups.back().push_back({to, valid ? from : nullptr});
}

void commit_copies() { self->groups.emplace_back(); }

void wait_for_copies(int newest) {
    auto& groups = self->groups;
    while (int(groups.size()) - 1 > newest) {
        for (const Copy& copy : groups.front()) {
            Cell& cell = block->shadow.cells[(copy.to - kBase) / 2];
            cell.state = Cell::written, cell.clock = self->clock[size_t(self->id)];
            if (copy.from != nullptr) read_global(copy.from, 16);  // not before
            if (copy.from != nullptr)
                std::memcpy(bytes_at(copy.to), copy.from, 16);
            else
                std::memset(bytes_at(copy.to), 0, 16);
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
    note_global(address, sizeof(X), adding);
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
    note_global(address, 8, adding);
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

// d += a b of a warp. `unpack(register, half)` gives a number; K numbers of a row, `pair` of them a register.
template <int K, int pair, typename Unpack>
void product(const char* what, int line, Product mine, Unpack unpack) {
    together(
        what, &mine,
        [unpack](void* const* of_lane) {
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

}  // namespace

void load_matrices(uint32_t (&r)[4], Shared row, int line) {
    gather_matrices("load_matrices", {row, r, false}, line);
}
void load_matrices_transposed(uint32_t (&r)[4], Shared row, int line) {
    gather_matrices("load_matrices_transposed", {row, r, true}, line);
}

template <>
void multiply<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
    product<16, 2>("multiply", line, {d, a, {b0, b1}},
                   [](uint32_t x, int half) { return to_float(BFloat16{uint16_t(x >> 16 * half)}); });
}
template <>
void multiply<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
    product<16, 2>("multiply", line, {d, a, {b0, b1}},
                   [](uint32_t x, int half) { return to_float(Half{uint16_t(x >> 16 * half)}); });
}
void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
    product<8, 1>("multiply_tf32", line, {d, a, {b0, b1}},
                  [](uint32_t x, int) { return as_float(x & ~0x1fffu); });
}

Device::Device(const torch::stable::Tensor&) { ++devices; }
Device::~Device() {
    if (--devices == 0) views.clear();
}

}  // namespace slm

extern "C" __attribute__((visibility("default"))) int64_t slm_executor_take_conflicts() {
    const int64_t now = slm::executor::conflicts;
    slm::executor::conflicts = 0;
    return now;
}
