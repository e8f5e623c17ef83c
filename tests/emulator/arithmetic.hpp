// What one thread computes by itself: in place of types.cuh and ptx.cuh.

template <class T>
inline T atomicAdd(T* to, T value) {
    T before = *to;
    *to += value;
    return before;
}
template <class T>
inline T atomicMax(T* to, T value) {
    T before = *to;
    *to = max(before, value);
    return before;
}
inline uint32_t __float_as_uint(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline int __float_as_int(float f) {
    return static_cast<int>(__float_as_uint(f));
}
inline float __int_as_float(int bits) {
    return __uint_as_float(static_cast<uint32_t>(bits));
}
inline int __float2int_rn(float f) {
    return std::isnan(f) ? 0 : static_cast<int>(nearbyintf(f));
}
inline float bits_to_float(uint32_t bits) {
    return __uint_as_float(bits);
}
inline float half_to_float(half_t h) {
    return _cvtsh_ss(h);
}
inline half_t float_to_half(float f) {
    return _cvtss_sh(f, 0);
}
inline uint32_t pack_half2(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline float low_half(uint32_t pair) {
    return half_to_float(static_cast<half_t>(pair));
}
inline float high_half(uint32_t pair) {
    return half_to_float(static_cast<half_t>(pair >> 16));
}
inline void forget(int&) {}
inline uint32_t low_halves(uint32_t pair) {
    return (pair & 0xffff) * 0x10001u;
}
inline uint32_t high_halves(uint32_t pair) {
    return (pair >> 16) * 0x10001u;
}
inline uint32_t half2_add(uint32_t a, uint32_t b) {
    return pack_half2(low_half(a) + low_half(b), high_half(a) + high_half(b));
}
inline uint32_t half2_multiply(uint32_t a, uint32_t b) {
    return pack_half2(low_half(a) * low_half(b), high_half(a) * high_half(b));
}
inline uint32_t half2_fma(uint32_t a, uint32_t b,
                          uint32_t c) {  // a float holds a product of halves
    return pack_half2(fmaf(low_half(a), low_half(b), low_half(c)), fmaf(high_half(a), high_half(b), high_half(c)));
}
inline uint32_t half2_max(uint32_t a, uint32_t b) {
    auto larger = [](float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : max(x, y); };
    return pack_half2(larger(low_half(a), low_half(b)), larger(high_half(a), high_half(b)));
}
inline void begin_kernel() {}
inline void begin_short_kernel() {}
constexpr bool kTightRegisters = false;
constexpr int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline void sincospi(double x, double* s, double* c) {
    x = std::fmod(x, 2.0);
    *s = std::sin(M_PI * x), *c = std::cos(M_PI * x);
}
inline void prefetch(const void*) {}
inline float exp2_approx(float x) {
    return exp2f(x);
}
inline float reciprocal_approx(float x) {
    return 1.0f / x;
}
inline uint32_t thread_here() {
    return threadIdx.x;
}
template <class T>
inline T load_where(bool inside, const T* from, T otherwise) {
    return inside ? *from : otherwise;
}
template <class T>
inline void store_where(bool inside, void* to, const T& value) {
    if (inside) *static_cast<T*>(to) = value;
}
inline void reduce_add(float* to, float value) {
    *to += value;
}
inline void reduce_add(float* to, const float4& values) {
    to[0] += values.x, to[1] += values.y, to[2] += values.z, to[3] += values.w;
}
