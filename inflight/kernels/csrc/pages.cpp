// Copies of cache blocks and states in a form that does not depend on where they lie, for files that outlive the
// program. A block is [layer][keys, values][key head][positions as the cache holds them], then the scales of an int8
// cache in the same order. Latents are keys alone.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "program.h"

namespace inflight {
namespace {

// Calls `copy(address, bytes)` for each piece of a block, in the order of the form above.
template <class Copy>
void pieces(const std::vector<Attention>& layers, int64_t block, const Copy& copy) {
    for (const Attention& a : layers) {
        if (a.source >= 0) continue;
        const int64_t first = block * a.block_size, end = first + a.block_size, position = a.depth * kv_bytes(a.type);
        for (char* array : a.latent ? std::vector<char*>{a.keys} : std::vector<char*>{a.keys, a.values})
            for (int64_t head = 0; head < a.kv_heads; head++)
                for (int64_t at = first; at < end;) {
                    const int64_t stop = std::min(end, (at / kExtent + 1) * kExtent);
                    copy(array + at / kExtent * a.extent + (head * kExtent + at % kExtent) * position,
                         (stop - at) * position);
                    at = stop;
                }
        if (a.type != KvType::kInt8) continue;
        for (float* array :
             a.latent ? std::vector<float*>{a.key_scales} : std::vector<float*>{a.key_scales, a.value_scales})
            for (int64_t head = 0; head < a.kv_heads; head++)
                copy(reinterpret_cast<char*>(array + head * a.blocks * a.block_size + first), a.block_size * 4);
    }
}

}  // namespace

void Program::check_block(int64_t block) const {
    if (layers_.empty() || !layers_.front().keys) throw std::out_of_range("the program has no cache yet");
    if (block < 0 || block >= layers_.front().blocks)
        throw std::out_of_range("there is no block " + std::to_string(block));
}

int64_t Program::block_bytes() const {
    check_block(0);
    int64_t sum = 0;
    pieces(layers_, 0, [&](char*, int64_t bytes) { sum += bytes; });
    return sum;
}

void Program::read_block(int64_t block, char* to) const {
    check_block(block);
    pieces(layers_, block, [&](const char* piece, int64_t bytes) {
        std::memcpy(to, piece, static_cast<size_t>(bytes));
        to += bytes;
    });
}

void Program::write_block(int64_t block, const char* from) {
    check_block(block);
    pieces(layers_, block, [&](char* piece, int64_t bytes) {
        std::memcpy(piece, from, static_cast<size_t>(bytes));
        from += bytes;
    });
}

void Program::read_state(int64_t slot, char* to) const {
    if (slot < 0 || slot >= slots_) throw std::out_of_range("there is no state " + std::to_string(slot));
    std::memcpy(to, states_ + slot * state_floats_, static_cast<size_t>(state_bytes()));
}

void Program::write_state(int64_t slot, const char* from) {
    if (slot < 0 || slot >= slots_) throw std::out_of_range("there is no state " + std::to_string(slot));
    std::memcpy(states_ + slot * state_floats_, from, static_cast<size_t>(state_bytes()));
}

// Sixteen sums of multiplied words, so that it runs at the speed of memory. It finds damage, not forgery.
uint64_t checksum(const char* data, int64_t bytes) {
    constexpr int kSums = 16;
    constexpr uint64_t kOdd = 0x9E3779B185EBCA87ull, kOther = 0xC2B2AE3D27D4EB4Full;
    uint64_t sums[kSums];
    for (int i = 0; i < kSums; i++) sums[i] = kOther * static_cast<uint64_t>(i + 1);
    auto mix = [&](uint64_t sum, uint64_t word) {
        sum = (sum ^ word) * kOdd;
        return sum ^ (sum >> 32);
    };
    int64_t at = 0;
    uint64_t words[kSums];
    for (; at + 8 * kSums <= bytes; at += 8 * kSums) {
        std::memcpy(words, data + at, sizeof words);
        for (int i = 0; i < kSums; i++) sums[i] = mix(sums[i], words[i]);
    }
    std::memset(words, 0, sizeof words);
    std::memcpy(words, data + at, static_cast<size_t>(bytes - at));
    for (int i = 0; i < kSums; i++) sums[i] = mix(sums[i], words[i]);
    uint64_t whole = mix(kOther, static_cast<uint64_t>(bytes));
    for (uint64_t sum : sums) whole = mix(whole, sum);
    return whole;
}

}  // namespace inflight
