// In place of sm90.cuh, and of Barrier in barriers.cuh.

struct Barrier {  // kernels/include/barriers.cuh
    static constexpr int kBytes = 8;
    uint32_t address;

    BarrierState& state(int block) const { return barrier_states[block][address / 8]; }
    void turn(int block) const {
        BarrierState& own = state(block);
        if (own.pending == 0 && own.bytes == 0) own.pending = own.expected, ++own.phase;
    }
    void init(int arrivals) const { state(own_block()) = {arrivals, arrivals, 0, 0}; }
    void arrive_in(int block) const { --state(block).pending, turn(block); }
    void arrive() const { arrive_in(own_block()); }
    void arrive_expecting(int bytes) const { state(own_block()).bytes += bytes, arrive(); }
    void come(int block, int bytes) const { state(block).bytes -= bytes, turn(block); }
    void publish_in(int block) const { arrive_in(block); }
    void wait_for_cluster(uint32_t parity) const { wait(parity); }
    void wait(uint32_t parity) const {
        while ((state(own_block()).phase & 1) == static_cast<int>(parity)) yield();
        ++fibers.passed;
    }
};
inline void fence_barrier_init() {}
inline void finish_loads() {}
inline void store_in(int block, uint32_t address, float value) {
    memcpy(shared_memory[block] + address, &value, sizeof(value));
}
inline float2 load_shared_where(bool inside, uint32_t address, float2 otherwise) {
    if (inside) memcpy(&otherwise, own_memory() + address, sizeof(otherwise));
    return otherwise;
}
inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    fibers.held[warp][lane][0] = address;
    meet_warp();
    for (int i = 0; i < 8; ++i) {
        uint32_t to = fibers.held[warp][i / 2 * 8 + lane % 4 * 2 + i % 2][0] + lane / 4 * 2;
        half_t value = static_cast<half_t>(r[i / 2] >> 16 * (i % 2));
        memcpy(own_memory() + to, &value, 2);
    }
    meet_warp();
}
inline void bulk_copy(uint32_t destination, const void* source, int bytes, Barrier barrier, bool) {
    memcpy(own_memory() + destination, source, bytes);
    barrier.come(own_block(), bytes);
}
struct TensorMap {  // as tests/emulator.py writes it: boxes of box_rows by 128 bytes
    uint64_t address, rows, columns, row_bytes, box_rows, column_bytes;
};
inline uint32_t swizzled(uint32_t address) {  // the 128-byte swizzle
    return address ^ (address >> 7 & 7) << 4;
}
inline void prefetch_map(const void*) {}
inline void tensor_copy(uint32_t destination, const void* map, int column, int row, Barrier barrier, uint16_t blocks) {
    TensorMap from;
    memcpy(&from, map, sizeof(from));
    int rows = static_cast<int>(from.box_rows);
    for (int block = 0; block < kEmulatedBlocks; ++block) {
        if (!(blocks >> block & 1)) continue;
        int size = static_cast<int>(from.column_bytes);
        for (int r = row; r < row + rows; ++r)
            for (int at = 0; at < 128; at += size) {
                uint8_t* to = shared_memory[block] + swizzled(destination + 128 * (r - row) + at);
                int c = column + at / size;
                if (r >= 0 && r < static_cast<int>(from.rows) && c < static_cast<int>(from.columns))
                    memcpy(to, reinterpret_cast<uint8_t*>(from.address) + r * from.row_bytes + size * c, size);
                else memset(to, 0, size);  // outside
            }
        barrier.come(block, rows * 128);
    }
}
inline void tensor_copy(uint32_t destination, const void* map, int column, int row, Barrier barrier) {
    tensor_copy(destination, map, column, row, barrier, static_cast<uint16_t>(1 << own_block()));
}
template <int kBlocks>
inline void tensor_copy_to(uint32_t destination, const void* map, int column, int row, Barrier barrier) {
    if (kBlocks == 1) tensor_copy(destination, map, column, row, barrier);
    else tensor_copy(destination, map, column, row, barrier, static_cast<uint16_t>((1 << kBlocks) - 1));
}
template <int kBlocks>
inline void sync_blocks() {
    if (kBlocks == 1) __syncthreads();
    else cluster_sync();
}
template <int kThreads>
inline void sync_threads(int barrier) {
    meet(fibers.named[own_block()][barrier], kThreads);
}
template <int kRegisters>
inline void give_up_registers() {}
template <int kRegisters>
inline void take_registers() {}

inline uint64_t wgmma_operand(uint32_t address, uint32_t panel = 16) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(panel >> 4) << 16 | 64ull << 32 |
           1ull << 62;
}
inline void wgmma_begin() {}
inline void wgmma_commit() {}
template <int kPending>
inline void wgmma_wait() {}
inline float operand_value(uint64_t operand, int row, int k, bool transposed) {
    uint32_t address = (operand & 0x3fff) << 4, panel = (operand >> 16 & 0x3fff) << 4;
    address += transposed ? row / 64 * panel + k * 128 + row % 64 * 2 : row * 128 + k * 2;
    half_t value;
    memcpy(&value, own_memory() + swizzled(address), 2);
    return half_to_float(value);
}
inline int operand_byte(uint64_t operand, int row, int k) {
    uint32_t address = ((operand & 0x3fff) << 4) + row * 128 + k;
    return static_cast<int8_t>(own_memory()[swizzled(address)]);
}
inline void meet_warpgroup() {
    meet(fibers.group[fibers.current / 128], 128);
}
inline float multiplied(float a, float b, float sum) {
    return fmaf(a, b, sum);
}
inline int multiplied(int a, int b, int sum) {
    return a * b + sum;
}
// d (+)= a * b: left(r, k) gives a's columns of a thread's two rows, right(n, k) those of b's rows; kColumns of each.
template <int kColumns, class T, int D, class Left, class Right>
inline void multiply_rows(T (&d)[D], bool accumulate, Left left, Right right) {
    meet_warpgroup();  // all have what they give
    T a[2][kColumns];
    for (int r = 0; r < 2; ++r)
        for (int k = 0; k < kColumns; ++k) a[r][k] = left(r, k);
    int lane = fibers.current % 32;
    for (int j = 0; j < D / 4; ++j)
        for (int c = 0; c < 2; ++c) {
            T sum[2] = {accumulate ? d[4 * j + c] : 0, accumulate ? d[4 * j + 2 + c] : 0};
            for (int k = 0; k < kColumns; ++k) {
                T value = right(8 * j + lane % 4 * 2 + c, k);
                for (int r = 0; r < 2; ++r) sum[r] = multiplied(a[r][k], value, sum[r]);
            }
            d[4 * j + c] = sum[0], d[4 * j + 2 + c] = sum[1];
        }
    meet_warpgroup();
}
// The first of a thread's two rows of a; and a word of them, which the lanes of four columns hold.
inline int row_of_left() {
    return fibers.current / 32 % 4 * 16 + fibers.current % 32 / 4;
}
inline uint32_t held_word(int column, int word) {
    return fibers.held[fibers.current / 32][fibers.current % 32 / 4 * 4 + column][word];
}
template <bool kTransposed = false, int D>
inline void wgmma_f16(float (&d)[D], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool accumulate) {
    hold_left({a0, a1, a2, a3});
    auto left = [](int r, int k) {
        uint32_t pair = held_word(k % 8 / 2, r + k / 8 * 2);
        return k % 2 ? high_half(pair) : low_half(pair);
    };
    multiply_rows<16>(d, accumulate, left, [b](int n, int k) { return operand_value(b, n, k, kTransposed); });
}
template <int D>
inline void wgmma_f16(float (&d)[D], uint64_t a, uint64_t b, bool accumulate) {
    auto left = [a](int r, int k) { return operand_value(a, row_of_left() + 8 * r, k, false); };
    multiply_rows<16>(d, accumulate, left, [b](int n, int k) { return operand_value(b, n, k, false); });
}
template <int D>
inline void wgmma_s8(int (&d)[D], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    hold_left(a);
    auto left = [](int r, int k) { return byte_of(held_word(k % 16 / 4, r + k / 16 * 2), k % 4); };
    multiply_rows<32>(d, accumulate, left, [b](int n, int k) { return operand_byte(b, n, k); });
}
template <int D>
inline void wgmma_s8(int (&d)[D], uint64_t a, uint64_t b, bool accumulate) {
    auto left = [a](int r, int k) { return operand_byte(a, row_of_left() + 8 * r, k); };
    multiply_rows<32>(d, accumulate, left, [b](int n, int k) { return operand_byte(b, n, k); });
}
