// Shared memory, its copies, and mma: in place of ptx.cuh.

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - own_memory());
}
inline void cp_async16(uint32_t destination, const void* source, bool valid) {
    int own = fibers.current;
    copies[own].push_back({own_memory() + destination, source, valid, copy_groups[own]});
}
inline void cp_async_commit() {
    ++copy_groups[fibers.current];
}
template <int kPending>
inline void cp_async_wait() {
    std::vector<Copy>& own = copies[fibers.current];
    size_t done = 0;
    for (; done < own.size() && own[done].group < copy_groups[fibers.current] - kPending; ++done)
        if (own[done].valid) memcpy(own[done].destination, own[done].source, 16);
        else memset(own[done].destination, 0, 16);
    own.erase(own.begin(), own.begin() + done);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    fibers.held[warp][lane][0] = address;
    meet_warp();
    for (int matrix = 0; matrix < 4; ++matrix) {
        auto value = [&](int row, int column) {
            half_t h;
            memcpy(&h, own_memory() + fibers.held[warp][8 * matrix + row][0] + 2 * column, 2);
            return static_cast<uint32_t>(h);
        };
        int row = lane / 4, column = lane % 4 * 2;
        r[matrix] = transposed ? value(column, row) | value(column + 1, row) << 16
                               : value(row, column) | value(row, column + 1) << 16;
    }
    meet_warp();
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    load_matrices(r, address, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    load_matrices(r, address, true);
}
inline void hold_left(const uint32_t (&a)[4]) {
    uint32_t* own = fibers.held[fibers.current / 32][fibers.current % 32];
    for (int i = 0; i < 4; ++i) own[i] = a[i];
}
// The operands of all lanes of a warp are held when this returns: a's words, then b's.
inline void hold_operands(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    hold_left(a);
    uint32_t* own = fibers.held[fibers.current / 32][fibers.current % 32];
    own[4] = b0, own[5] = b1;
    meet_warp();
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    hold_operands(a, b0, b1);
    auto half = [](uint32_t pair, int odd) { return odd ? high_half(pair) : low_half(pair); };
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; ++k) {
            uint32_t left = fibers.held[warp][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            uint32_t right = fibers.held[warp][column * 4 + k % 8 / 2][4 + k / 8];
            sum = fmaf(half(left, k % 2), half(right, k % 2), sum);
        }
        d[i] = sum;
    }
    meet_warp();
}
inline void mma_m16n8k16_alone(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    for (float& sum : d) sum = 0.0f;
    mma_m16n8k16(d, a, b0, b1);
}
inline int byte_of(uint32_t word, int at) {
    return static_cast<int8_t>(word >> 8 * at);
}
inline void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    hold_operands(a, b0, b1);
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k)
            d[i] += byte_of(fibers.held[warp][row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], k % 4) *
                    byte_of(fibers.held[warp][column * 4 + k % 16 / 4][4 + k / 16], k % 4);
    }
    meet_warp();
}
