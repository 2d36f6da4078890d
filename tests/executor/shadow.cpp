// The shadow of memory: who wrote and read what, and when, and whether that may be.
#include <algorithm>
#include <unordered_map>

#include "machine.h"

namespace slm::executor {

namespace {

std::vector<View> views;
std::unordered_map<uintptr_t, Shadow> pages;  // of global memory, as this launch uses it
Uses global_uses;

}  // namespace

std::string name_of(int agent) {
    const int beyond = agent - int(block->threads.size());
    if (beyond < 0) return "thread " + std::to_string(agent);
    return beyond < kMbarriers ? "the copy engine"
                               : "a product of warp " + std::to_string(beyond - kMbarriers);
}

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
    fail("%s %s that %s %s: no barrier between", kDoes[now], place, name_of(agent).c_str(), kDid[then]);
}

// Notes a use of a cell, unless an earlier one conflicts and nothing orders the two. What lies in the past of this
// use is forgotten, where whatever conflicts with it conflicts with this one as well.
void note(Uses& uses, Cell& cell, Kind kind, Shared address) {
    if (cell.state == Cell::pending)
        fail("%s at byte %u of shared memory before the copy of %s was waited for", kDoes[kind],
             address - kBase, name_of(cell.writer).c_str());
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

}  // namespace

Cell& note_shared(Shared address, int bytes, Kind kind) {
    const size_t first = cell_at(address, bytes, kDoes[kind]);
    note(block->shadow, block->uses, first, bytes, kind, address);
    return block->shadow.cells[first];
}

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

}  // namespace

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

void add_global(const void* address, int bytes) { note_global(address, bytes, adding); }

void forget_global() { pages.clear(), global_uses = {}; }
void forget_views() { views.clear(); }

}  // namespace slm::executor
