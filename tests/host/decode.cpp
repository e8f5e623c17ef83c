// Decodes one weight tile of any block format on the host, by the structs that the kernels are compiled with: GGUF's
// rows of one unit come on stdin, their weights in float32 go to stdout. usage: decode FORMAT
#include <cstdio>
#include <string>
#include <vector>
#include "quants/all.cuh"

template <class Format>
void decode() {
    std::vector<uint8_t> source(kTileRows * Format::kBytes), tile(source.size());
    if (fread(source.data(), 1, source.size(), stdin) != source.size()) __builtin_trap();
    Unit<Format::kBytes> unit{tile.data(), 0};
    for (int row = 0; row < kTileRows; ++row)
        for (int to = 0; to < Format::kBytes; ++to) {
            unit.row = row;
            const_cast<uint8_t*>(unit.at(to))[0] =
                static_cast<uint8_t>(repacked_byte<Format>(source.data() + row * Format::kBytes, to));
        }
    for (int row = 0; row < kTileRows; ++row)
        for (int at = 0; at < Format::kElements; at += 16) {
            float out[16];
            decode_floats<Format>(tile.data(), row, at, out);
            fwrite(out, 4, 16, stdout);
        }
}

int main(int, char** arguments) {
    std::string name = arguments[1];
#define TRY(FORMAT) if (name == #FORMAT) decode<FORMAT>();
    TRY_ALL
}
