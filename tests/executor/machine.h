// What executor.cpp, shadow.cpp and hopper.cpp share: the block that runs, its threads, the shadow of its memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
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

using Clocks = std::map<int, Clock>;  // of other blocks

inline void join(Clocks& clocks, const Clocks& others) {
    for (const auto& [number, clock] : others) {
        const auto [mine, fresh] = clocks.try_emplace(number, clock);
        if (!fresh) join(mine->second, clock);
    }
}

struct Copy {
    Shared to;
    const void* from;  // null: zeros
    int bytes;
    int cells() const { return bytes == 16 ? 1 : bytes / 2; }  // that hold its state
};

struct Thread {
    int id;
    Clock clock;
    Clocks others;  // what lies in the past of other blocks' events
    Clocks fenced;  // what did at this thread's last fence, its own block's events too
    Clocks received;  // what its atomics have met and the next fence will put into the past
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

// Two bytes of memory: the last write, and what else was done there since.
struct Cell {
    enum State : uint8_t { unwritten, pending, written } state = unwritten;
    int writer = -1;  // none
    uint32_t clock = 0;
    int block = 0;
    uint32_t uses = 0;  // a list of Use, 0 for none
};
struct Use {
    int agent;
    uint32_t clock;
    int block;
    bool adds;  // by an atomic, else a read
    uint32_t next;
};
struct Uses {
    std::vector<Use> all{1};  // the first stands for none
    uint32_t spare = 0;  // a list of those to use again

    void add(Cell& cell, Use use);
};

// Of some memory. Eight cells used 16 bytes at a time are one, the first, until they are used apart.
struct Shadow {
    std::vector<Cell> cells;
    std::vector<char> whole;

    void resize(size_t size) { cells.resize(size), whole.assign(size / 8, true); }
};

struct Gathering {  // of threads that wait for one another
    const char* what = nullptr;
    int which = 0;
    int expected = 0, arrived = 0;
    uint64_t times = 0;
    Clock clock;
    Clocks others;
    std::vector<Thread*> waiting;
    void* lanes[kWarp];
};

struct Hopper;  // what hopper.cpp keeps for a block

struct Block {
    std::vector<Thread> threads;
    std::vector<char> memory;
    Shadow shadow;
    Uses uses;
    std::vector<Gathering> warps, warp_syncs;
    Gathering barriers[16];
    size_t agents = 0;  // beside the threads
    std::shared_ptr<Hopper> hopper;

    Clock no_events() const { return Clock((threads.size() + agents) * (agents > 0 ? 2 : 1)); }
};

extern Block* block;
extern Thread* self;
extern std::string error;
extern int number;  // of the block

void wait(const uint64_t& counter, uint64_t seen, const char* what);
std::string name_of(int agent);
bool in_the_past(int thread, uint32_t clock);
std::vector<Cell>::iterator cells_at(Shared address, int bytes, const char* what);
char* bytes_at(Shared address);
void note_write(Cell& cell, Shared address, Cell::State state);
void add_read(Cell& cell, int agent, uint32_t clock);  // replaces an earlier one
void check_global(const void* address, int bytes, const char* what);

// Of shadow.cpp.
enum Kind { reading, writing, adding };  // by an atomic
Cell& note_shared(Shared address, int bytes, Kind kind);  // the first of its cells
void add_global(const void* address, int bytes);
void forget_global();
void forget_views();

// Of hopper.cpp. Where nothing else can go on: brings a box that a thread waits for, if there is one.
bool deliver_a_box();
void end_thread_of_hopper();
std::string end_block_of_hopper();  // an error, or nothing

}  // namespace slm::executor
