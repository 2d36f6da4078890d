// The machine behind hopper.h: mbarriers, the copy engine, products beside the threads.
#include "../../csrc/common/hopper.cuh"

#include <bitset>
#include <deque>
#include <list>
#include <map>

#include "machine.h"

namespace slm::executor {

namespace {

int64_t products;  // of one multiply_async each
constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN: what sums hold until they are waited for

struct Box {  // of a tensor, on its way
    TensorMap map;
    Shared to;
    int64_t at[4];
    int bytes() const { return int(map.box[0] * map.box[1] * map.box[2] * map.box[3] * 2); }
};

struct Mbarrier {
    int agent;
    int arrivals, missing;  // of a phase
    int64_t bytes = 0;  // expected and not there yet
    uint64_t phase = 0;
    Clock arrived, ended;
    int writer;  // who initialised it, and when
    uint32_t clock;
    bool fenced = false;
    std::deque<Box> boxes;
};

struct Product {
    uint64_t group;
    ProductLane lane;  // what is the same for all
    std::vector<uint32_t> a;  // [128, 4], if it is in registers
};

struct Sums {  // a matrix d, in flight
    float* of_lane[kWarpgroup];
    int tiles;
    uint64_t last_group = 0;
    std::vector<float> values;  // [64, 8 tiles]
    std::deque<Product> products;  // not yet computed
    std::bitset<kWarpgroup> collected;
};

struct Operand {  // a in registers, being read
    uint64_t group;
    const uint32_t* data;
    uint32_t copy[4];
};

struct Lane {
    uint64_t groups = 0;  // committed
    bool fenced = false;  // since the last wait
    int registers = 0;
    std::map<const void*, std::vector<char>> seen;  // registers as the last fence that named them saw them
    std::vector<Operand> operands;
};

struct Warpgroup {
    int arrived = 0;
    uint64_t times = 0;
    ProductLane lanes[kWarpgroup];
    std::list<Sums> sums;
};

}  // namespace

struct Hopper {
    std::map<Shared, Mbarrier> mbarriers;
    std::vector<Lane> lanes;
    std::vector<Warpgroup> groups;
};

namespace {

Hopper& hopper() {
    if (block->agents == 0) fail("an instruction of sm_90a; the architecture is %d", architecture());
    if (block->hopper == nullptr) {
        block->hopper = std::make_shared<Hopper>();
        block->hopper->lanes.resize(block->threads.size());
        block->hopper->groups.resize((block->threads.size() + kWarpgroup - 1) / kWarpgroup);
    }
    return *block->hopper;
}

Lane& lane() { return hopper().lanes[size_t(self->id)]; }
Warpgroup& warpgroup() { return hopper().groups[size_t(self->id / kWarpgroup)]; }
size_t known_to_proxy(int agent) { return block->threads.size() + block->agents + size_t(agent); }
int agent_of_warp(int warp) { return int(block->threads.size()) + kMbarriers + warp; }

void learn(Clock& clock, int agent, uint32_t event) {  // of the asynchronous proxy, which needs no fence
    for (const size_t n : {size_t(agent), known_to_proxy(agent)}) clock[n] = std::max(clock[n], event);
}

bool by_a_thread(int agent) { return agent < int(block->threads.size()); }

Mbarrier& mbarrier_at(Shared address) {
    auto& all = hopper().mbarriers;
    const auto found = all.find(address);
    if (found == all.end()) fail("byte %d of shared memory is no mbarrier", int(address) - int(kBase));
    const Mbarrier& m = found->second;
    if (!in_the_past(m.writer, m.clock))
        fail("a mbarrier that thread %d initialises: no barrier between", m.writer);
    return found->second;
}

void end_phase_if_complete(Mbarrier& m) {
    if (m.missing > 0 || m.bytes != 0) return;
    m.missing = m.arrivals;
    ++m.phase;
    m.ended = m.arrived;
    learn(m.ended, m.agent, uint32_t(m.phase));
}

void arrive_at(Shared address, int bytes) {
    Mbarrier& m = mbarrier_at(address);
    if (m.missing == 0) fail("an arrival at a mbarrier beyond the %d of its phase", m.arrivals);
    join(m.arrived, self->clock);
    ++self->clock[size_t(self->id)];
    --m.missing;
    m.bytes += bytes;
    if (m.missing == 0 && m.bytes < 0) fail("%d bytes more than the mbarrier expects", int(-m.bytes));
    end_phase_if_complete(m);
}

// With swizzle, where the byte of a linear address lies.
Shared swizzled(Shared address, Swizzle swizzle) {
    const Shared bits[] = {0, 7, 3, 1};
    return address ^ (address >> 3 & bits[int(swizzle)] << 4);
}

// The address of [n, k] in a matrix of 16-bit numbers: the canonical layouts of 9.7.15.5.1.2.1.3.
Shared address_in(uint64_t matrix, Major major, Shared n, Shared k) {
    const Shared start = Shared(matrix & 0x3fff) << 4, leading = Shared(matrix >> 16 & 0x3fff) << 4;
    const Shared stride = Shared(matrix >> 32 & 0x3fff) << 4;
    const Swizzle swizzle = Swizzle(matrix >> 62);
    const Shared pieces_of[] = {1, 8, 4, 2}, P = pieces_of[int(swizzle)];
    Shared offset;
    if (major == Major::k)
        offset = n % 8 * 16 * P + n / 8 * stride + k % 8 * 2 + k / 8 * (P == 1 ? leading : 16);
    else if (P == 1)
        offset = n % 8 * 2 + n / 8 * stride + k % 8 * 16 + k / 8 * leading;
    else
        offset = n % (8 * P) * 2 + n / (8 * P) * leading + k % 8 * 16 * P + k / 8 * stride;
    return swizzled(start + offset, swizzle);
}

float number_at(Shared address, bool bf16) {
    uint16_t bits;
    std::memcpy(&bits, bytes_at(address), 2);
    return bf16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
}

// All that a product of the warpgroup reads: known to the proxy in each lane? And it is being read from now
// on.
void read_matrix(uint64_t matrix, Major major, int rows, const Clock& known, uint64_t group) {
    const Shared start = Shared(matrix & 0x3fff) << 4, repeats[] = {0, 0x380, 0x180, 0x80};
    if ((start & repeats[matrix >> 62]) != 0)
        fail("a matrix at byte %d of shared memory: its swizzle does not begin there",
             int(start) - int(kBase));
    if ((matrix & 0x3fffc000c000c000u) != 0) fail("a descriptor with bits that are not used here");
    for (int n = 0; n < rows; ++n)
        for (int k = 0; k < 16; ++k) {
            const Shared address = address_in(matrix, major, Shared(n), Shared(k));
            Cell& cell = *cells_at(address, 2, "product");
            const int at = int(address - kBase);
            if (cell.state == Cell::unwritten)
                fail("product with byte %d of shared memory, which nobody has written", at);
            if (cell.state == Cell::pending)
                fail("product with byte %d of shared memory before the copy was waited for", at);
            if (known[size_t(cell.writer)] < cell.clock)
                fail("product with byte %d of shared memory, written by %s: no barrier between", at,
                     name_of(cell.writer).c_str());
            if (known[known_to_proxy(cell.writer)] < cell.clock)
                fail("product with byte %d of shared memory, written by thread %d: no proxy fence between",
                     at, cell.writer);
            for (int w = 0; w < kWarpgroup / kWarp; ++w)
                add_read(cell, agent_of_warp(self->id / kWarpgroup * 4 + w), uint32_t(group));
        }
}

void check_poison(const Sums& sums, int of_lane) {
    for (int n = 0; n < 4 * sums.tiles; ++n)
        if (as_bits(sums.of_lane[of_lane][n]) != kPoison)
            fail("sums of a product were written before they were waited for");
}

int row_of(int lane, int n) { return lane / 32 * 16 + lane % 32 / 4 + n / 2 % 2 * 8; }

void issue_for_all(Warpgroup& g) {
    const int first = self->id / kWarpgroup * kWarpgroup;
    const ProductLane& mine = g.lanes[0];
    const auto lane_of = [&](int l) -> Lane& { return hopper().lanes[size_t(first + l)]; };
    const uint64_t group = lane_of(0).groups + 1;
    Clock known = block->threads[size_t(first)].clock;
    for (int l = 0; l < kWarpgroup; ++l) {
        const Clock& clock = block->threads[size_t(first + l)].clock;
        for (size_t n = 0; n < known.size(); ++n) known[n] = std::min(known[n], clock[n]);
        const ProductLane& other = g.lanes[l];
        if (other.tiles != mine.tiles || other.a_matrix != mine.a_matrix || other.b_matrix != mine.b_matrix ||
            other.b_major != mine.b_major || other.accumulate != mine.accumulate || other.bf16 != mine.bf16 ||
            (other.a == nullptr) != (mine.a == nullptr) || lane_of(l).groups + 1 != group)
            fail("lanes of a warpgroup ask for different products");
        if (!lane_of(l).fenced) fail("product without a fence_products since the last wait");
    }
    if (mine.a == nullptr) read_matrix(mine.a_matrix, Major::k, 64, known, group);
    read_matrix(mine.b_matrix, mine.b_major, 8 * mine.tiles, known, group);

    const auto check_seen = [&](int l, const void* data, size_t bytes, const char* what) {
        auto& seen = lane_of(l).seen;  // arrays begin at their key; an operand is a part of one
        auto found = seen.upper_bound(data);
        const char* place = static_cast<const char*>(data);
        if (found == seen.begin() ||
            place + bytes > static_cast<const char*>((--found)->first) + found->second.size())
            fail("no fence_products names %s since its registers changed", what);
        const size_t offset = size_t(place - static_cast<const char*>(found->first));
        if (std::memcmp(found->second.data() + offset, data, bytes) != 0)
            fail("registers of %s were written after the fence", what);
    };
    auto sums = g.sums.begin();
    while (sums != g.sums.end() && sums->of_lane[0] != mine.d) ++sums;
    const int columns = 8 * mine.tiles;
    if (sums == g.sums.end()) {
        sums = g.sums.insert(sums, Sums{});
        sums->tiles = mine.tiles;
        sums->values.resize(size_t(64 * columns));
        for (int l = 0; l < kWarpgroup; ++l) {
            float* d = sums->of_lane[l] = g.lanes[l].d;
            if (mine.accumulate) check_seen(l, d, size_t(16 * mine.tiles), "the sums");
            for (int n = 0; n < 4 * mine.tiles; ++n) {
                sums->values[size_t(row_of(l, n) * columns + n / 4 * 8 + l % 4 * 2 + n % 2)] = d[n];
                d[n] = as_float(kPoison);
            }
        }
    } else {
        if (sums->tiles != mine.tiles || sums->collected.any())
            fail("product onto sums that some lanes have waited for, and some not");
        for (int l = 0; l < kWarpgroup; ++l) check_poison(*sums, l);
    }
    sums->last_group = group;
    Product product{group, mine, {}};
    for (int l = 0; mine.a != nullptr && l < kWarpgroup; ++l) {
        const uint32_t* a = g.lanes[l].a;
        check_seen(l, a, 16, "a");
        product.a.insert(product.a.end(), a, a + 4);
        lane_of(l).operands.push_back({group, a, {a[0], a[1], a[2], a[3]}});
    }
    sums->products.push_back(std::move(product));
    ++products;
}

void compute(Sums& sums) {
    const int columns = 8 * sums.tiles;
    std::vector<float> a(64 * 16), b(size_t(16 * columns));
    for (const Product& product : sums.products) {
        const ProductLane& lane = product.lane;
        for (int i = 0; i < 64; ++i)
            for (int k = 0; k < 16; ++k) {
                float& x = a[size_t(16 * i + k)];
                if (lane.a == nullptr) {
                    x = number_at(address_in(lane.a_matrix, Major::k, Shared(i), Shared(k)), lane.bf16);
                    continue;
                }
                const int owner = i / 16 * 32 + i % 8 * 4 + k % 8 / 2;
                const uint32_t pair = product.a[size_t(4 * owner + k / 8 * 2 + i / 8 % 2)];
                const uint16_t bits = uint16_t(pair >> 16 * (k % 2));
                x = lane.bf16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
            }
        for (int n = 0; n < columns; ++n)
            for (int k = 0; k < 16; ++k)
                b[size_t(k * columns + n)] =
                    number_at(address_in(lane.b_matrix, lane.b_major, Shared(n), Shared(k)), lane.bf16);
        if (!lane.accumulate) std::fill(sums.values.begin(), sums.values.end(), 0.f);
        for (int i = 0; i < 64; ++i)
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < columns; ++n)
                    sums.values[size_t(i * columns + n)] +=
                        a[size_t(16 * i + k)] * b[size_t(k * columns + n)];
    }
    sums.products.clear();
}

bool names(std::initializer_list<Registers> named, const void* data, size_t bytes) {
    const char* place = static_cast<const char*>(data);
    for (const Registers& r : named) {
        const char* begin = static_cast<const char*>(r.data);
        if (place >= begin && place + bytes <= begin + r.bytes) return true;
    }
    return false;
}

}  // namespace

void fence_registers(std::initializer_list<Registers> named) {
    Lane& mine = lane();
    mine.fenced = true;
    for (const Registers& r : named) {
        const char* begin = static_cast<const char*>(r.data);
        mine.seen[begin].assign(begin, begin + r.bytes);
    }
}

void issue_product(ProductLane mine) {
    Warpgroup& g = warpgroup();
    if (size_t(self->id / kWarpgroup + 1) * kWarpgroup > block->threads.size())
        fail("a product by %zu threads; a warpgroup has 128", block->threads.size() % kWarpgroup);
    g.lanes[self->id % kWarpgroup] = mine;
    const uint64_t seen = g.times;
    if (++g.arrived < kWarpgroup) return wait(g.times, seen, "multiply_async");
    issue_for_all(g);
    g.arrived = 0;
    ++g.times;
}

void wait_for_products(int newest, std::initializer_list<Registers> named) {
    Lane& mine = lane();
    Warpgroup& g = warpgroup();
    mine.fenced = false;
    const uint64_t done = mine.groups > uint64_t(newest) ? mine.groups - uint64_t(newest) : 0;
    learn(self->clock, agent_of_warp(self->id / kWarp), uint32_t(done));
    const size_t me = size_t(self->id % kWarpgroup);
    for (auto sums = g.sums.begin(); sums != g.sums.end();) {
        if (sums->last_group <= done && !sums->collected[me]) {
            compute(*sums);
            float* d = sums->of_lane[me];
            check_poison(*sums, int(me));
            if (!names(named, d, size_t(16 * sums->tiles))) fail("the wait does not name sums that it ends");
            const int columns = 8 * sums->tiles;
            for (int n = 0; n < 4 * sums->tiles; ++n)
                d[n] =
                    sums->values[size_t(row_of(int(me), n) * columns + n / 4 * 8 + int(me) % 4 * 2 + n % 2)];
            mine.seen.erase(d);
            sums->collected.set(me);
        }
        sums = sums->collected.all() ? g.sums.erase(sums) : std::next(sums);
    }
    for (const Operand& a : mine.operands) {
        if (a.group > done) continue;
        if (std::memcmp(a.copy, a.data, 16) != 0)
            fail("registers of a were written before the product was waited for");
        if (!names(named, a.data, 16)) fail("the wait does not name registers of a whose reading it ends");
    }
    mine.operands.erase(std::remove_if(mine.operands.begin(), mine.operands.end(),
                                       [&](const Operand& a) { return a.group <= done; }),
                        mine.operands.end());
}

void set_registers(int count, bool more) {
    together(more ? "take_registers" : "give_registers", nullptr, [](void* const*) {});
    lane().registers = count;
}

bool deliver_a_box() {
    if (block->hopper == nullptr) return false;
    for (auto& [address, m] : block->hopper->mbarriers) {
        if (m.boxes.empty()) continue;
        bool awaited = false;
        for (const Thread& thread : block->threads) awaited |= !thread.done && thread.awaited == &m.phase;
        if (!awaited) continue;
        const Box box = m.boxes.front();
        m.boxes.pop_front();
        const TensorMap& map = box.map;
        Shared linear = box.to;
        int64_t at[4];
        for (uint32_t n = 0; n < map.box[1] * map.box[2] * map.box[3]; ++n)
            for (uint32_t x = 0; x < map.box[0]; x += 8, linear += 16) {
                const uint32_t within[4] = {x, n % map.box[1], n / map.box[1] % map.box[2],
                                            n / map.box[1] / map.box[2]};
                bool inside = true;
                const char* from = map.data;
                for (int d = 0; d < 4; ++d) {
                    at[d] = box.at[d] + within[d];
                    inside &= at[d] >= 0 && uint64_t(at[d]) < map.sizes[d];
                    from += at[d] * int64_t(map.strides[d]);
                }
                const Shared to = swizzled(linear, Swizzle::bytes128);
                auto cell = cells_at(to, 16, "box");
                for (int c = 0; c < 8; ++c, ++cell) cell->state = Cell::written;
                if (inside)
                    std::memcpy(bytes_at(to), from, 16);
                else
                    std::memset(bytes_at(to), 0, 16);
            }
        m.bytes -= box.bytes();
        if (m.missing == 0 && m.bytes < 0)
            error = std::to_string(-m.bytes) + " bytes more than the mbarrier expects";
        end_phase_if_complete(m);
        return true;
    }
    return false;
}

void end_thread_of_hopper() {
    if (block->hopper == nullptr) return;
    for (const Sums& sums : warpgroup().sums)
        if (!sums.collected[size_t(self->id % kWarpgroup)])
            fail("the thread ends before its products were waited for");
}

std::string end_block_of_hopper() {
    if (block->hopper == nullptr) return "";
    for (const auto& entry : block->hopper->mbarriers)
        if (!entry.second.boxes.empty()) return "the block ends before its boxes were waited for";
    int given = 0, registers = 0;
    for (const Lane& lane : block->hopper->lanes) registers += lane.registers, given += lane.registers > 0;
    const int others = int(block->threads.size()) - given;
    registers += given > 0 ? others * (65536 / int(block->threads.size()) / 8 * 8) : 0;
    if (registers > 65536) return std::to_string(registers) + " registers; a multiprocessor has 65536";
    return "";
}

}  // namespace slm::executor

namespace slm {

using namespace executor;

TensorMap tensor_map(void* data, bool, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                     const uint32_t (&box)[4]) {
    TensorMap map{static_cast<const char*>(data),
                  {sizes[0], sizes[1], sizes[2], sizes[3]},
                  {2, strides[0], strides[1], strides[2]},
                  {box[0], box[1], box[2], box[3]}};
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, "tensor map: data must be a multiple of 16");
    STD_TORCH_CHECK(box[0] * 2 == 128, "tensor map: with 128-byte swizzle the box has 64 columns");
    for (int d = 0; d < 4; ++d) {
        STD_TORCH_CHECK(box[d] >= 1 && box[d] <= 256, "tensor map: a box of ", box[d]);
        STD_TORCH_CHECK(sizes[d] >= 1 && sizes[d] >> 32 == 0, "tensor map: a size of ", sizes[d]);
        if (d > 0)
            STD_TORCH_CHECK(map.strides[d] % 16 == 0 && map.strides[d] >> 40 == 0 &&
                                map.strides[d] >= map.strides[d - 1] * sizes[d - 1] &&
                                map.strides[d] % map.strides[d - 1] == 0,
                            "tensor map: a stride of ", map.strides[d], " bytes");
    }
    return map;
}

void init_mbarrier(Shared mbarrier, int arrivals) {
    auto& all = hopper().mbarriers;
    auto cell = cells_at(mbarrier, 8, "mbarrier");
    for (int n = 0; n < 8; n += 2) note_write(*cell++, mbarrier + unsigned(n), Cell::written);
    if (arrivals < 1 || all.count(mbarrier) > 0)
        fail("a mbarrier of %d arrivals, or a second at one place", arrivals);
    if (int(all.size()) == kMbarriers) fail("more than %d mbarriers", kMbarriers);
    Mbarrier& m = all[mbarrier];
    m.agent = int(block->threads.size() + all.size()) - 1;
    m.arrivals = m.missing = arrivals;
    m.arrived = m.ended = block->no_events();
    m.writer = self->id, m.clock = self->clock[size_t(self->id)];
}

void fence_mbarriers() {
    for (auto& [address, m] : hopper().mbarriers) m.fenced |= m.writer == self->id;
}

void fence_async() {
    hopper();
    const size_t half = self->clock.size() / 2;
    std::copy_n(self->clock.begin(), half, self->clock.begin() + std::ptrdiff_t(half));
    ++self->clock[size_t(self->id)];
}

void arrive(Shared mbarrier) { arrive_at(mbarrier, 0); }
void arrive_expecting(Shared mbarrier, int bytes) {
    if (bytes <= 0 || bytes >= 1 << 20) fail("a mbarrier cannot expect %d bytes", bytes);
    arrive_at(mbarrier, bytes);
}

void wait_phase(Shared mbarrier, int parity) {
    Mbarrier& m = mbarrier_at(mbarrier);
    if (int(m.phase & 1) == parity) wait(m.phase, m.phase, "mbarrier");
    join(self->clock, m.ended);
}

void load_box(Shared to, const TensorMap& map, Shared mbarrier, int x0, int x1, int x2, int x3) {
    Mbarrier& m = mbarrier_at(mbarrier);
    if (!m.fenced) fail("a copy to a mbarrier whose initialisation has no fence");
    if (to % 128 != 0) fail("a box at byte %d of shared memory: misaligned", int(to) - int(kBase));
    const Box box{map, to, {x0, x1, x2, x3}};
    int64_t last = 0;
    for (int d = 0; d < 4; ++d) last += int64_t(map.sizes[d] - 1) * int64_t(map.strides[d]);
    check_global(map.data, 2, "copy");
    check_global(map.data + last, 2, "copy");
    for (Shared at = to; at < to + Shared(box.bytes()); at += 16) {
        auto cell = cells_at(at, 16, "copy");
        for (int n = 0; n < 8; ++n, ++cell) {
            if (cell->state == Cell::pending)
                fail("copy to byte %u of shared memory, where a copy has not been waited for", at - kBase);
            const bool stored = cell->state != Cell::unwritten && by_a_thread(cell->writer);
            const uint32_t event = cell->clock;
            note_write(*cell, at, Cell::pending);
            if (stored && self->clock[known_to_proxy(cell->writer)] < event)
                fail("copy to byte %u of shared memory, which threads have stored: no proxy fence between",
                     at - kBase);
            cell->writer = m.agent, cell->clock = uint32_t(m.phase + 1);
        }
    }
    m.boxes.push_back(box);
}

bool elect() {
    together("elect", nullptr, [](void* const*) {});
    return lane_of_thread() == 0;
}

void commit_products() { ++lane().groups; }

}  // namespace slm

extern "C" __attribute__((visibility("default"))) int64_t slm_executor_take_products() {
    const int64_t now = slm::executor::products;
    slm::executor::products = 0;
    return now;
}
