// What executor.cpp and hopper.cpp share: the block that runs, its threads, the shadow of its memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/common/hardware.cuh"

namespace slm::executor {

constexpr Shared kBase = 4096;  // where shared memory begins: 0 would hide absolute addresses
constexpr int kMbarriers = 32;  // that a block may have

// Of each agent, how many of its events are known to lie in the past. Agents are the threads and, on sm_90a,
// the asynchronous proxy: one for each mbarrier, whose events are its phases, and one for each warp, whose
// events are its groups of products. The clock's second half counts only what a proxy fence has made known to
// that proxy.
using Clock = std::vector<uint32_t>;

inline void join(Clock& clock, const Clock& other) {
    for (size_t n = 0; n < clock.size(); ++n) clock[n] = std::max(clock[n], other[n]);
}

struct Copy {
    Shared to;
    const void* from;  // null: zeros
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

struct Hopper;  // what hopper.cpp keeps for a block

struct Block {
    std::vector<Thread> threads;
    std::vector<char> memory;
    std::vector<Cell> cells;
    std::vector<Read> reads;
    std::vector<Gathering> warps, warp_syncs;
    Gathering barriers[16];
    size_t agents = 0;  // beside the threads
    std::shared_ptr<Hopper> hopper;

    Clock no_events() const { return Clock((threads.size() + agents) * (agents > 0 ? 2 : 1)); }
};

extern Block* block;
extern Thread* self;
extern std::string error;

void wait(const uint64_t& counter, uint64_t seen, const char* what);
std::string name_of(int agent);
bool in_the_past(int thread, uint32_t clock);
std::vector<Cell>::iterator cells_at(Shared address, int bytes, const char* what);
char* bytes_at(Shared address);
void note_write(Cell& cell, Shared address, Cell::State state);
void add_read(Cell& cell, int agent, uint32_t clock);
void check_global(const void* address, int bytes, const char* what);

// Of hopper.cpp. Where nothing else can go on: brings a box that a thread waits for, if there is one.
bool deliver_a_box();
void end_thread_of_hopper();
std::string end_block_of_hopper();  // an error, or nothing

}  // namespace slm::executor
