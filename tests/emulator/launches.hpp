// A launch: a kernel is called for each block, with arguments as the driver takes them.

template <class... A, size_t... I>
static void launch(void (*kernel)(A...), const uint64_t* values, Index grid, unsigned threads, int cluster,
                   std::index_sequence<I...>) {
    std::tuple<A...> arguments;
    (memcpy(&std::get<I>(arguments), values + I, sizeof(A)), ...);
    auto body = [&] { kernel(std::get<I>(arguments)...); };
    gridDim = grid, blockDim = {threads, 1, 1};
    const char* order = getenv("KQ_EMULATED_ORDER");
    fibers.order = order ? strtoull(order, nullptr, 10) : 0;
    unsigned across = grid.x / cluster, blocks = across * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
        unsigned block = fibers.order ? blocks - 1 - i : i;
        blockIdx = {block % across * cluster, block / across % grid.y, block / across / grid.y};
        memset(shared_memory, 0xff, static_cast<size_t>(cluster) * kEmulatedBytes);
        auto call = [](void* own) { (*static_cast<decltype(body)*>(own))(); };
        run_cluster(cluster, static_cast<int>(threads), call, &body);
    }
}
template <class... A>
static void launch(void (*kernel)(A...), const uint64_t* values, Index grid, unsigned threads, int cluster) {
    launch(kernel, values, grid, threads, cluster, std::index_sequence_for<A...>());
}
