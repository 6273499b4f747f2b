// What the parts of the CPU engine hand to each other. docs/cpu-engine.md draws the layouts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace inflight {

constexpr int64_t kLanes = 16;         // outputs in one line of 64 bytes
constexpr int64_t kPanel = 2 * kLanes; // outputs that are computed together: two lines

// How a weight is kept. kInt8 has one scale an output; the grouped ones a float16 scale for each `group` inputs; those from
// kQ8_0 on are llama.cpp's block types, each at its own number of bits (blocks.h).
enum class Format : int {
    kFloat, kBf16, kInt8, kGroup8, kGroup4,
    kQ8_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kIq4Nl, kIq4Xs, kMxfp4,
};
constexpr int kFormats = 18;

constexpr bool is_grouped(Format format) { return format == Format::kGroup8 || format == Format::kGroup4; }
constexpr bool is_block(Format format) { return format >= Format::kQ8_0; }
constexpr bool is_integer(Format format) { return format != Format::kFloat && format != Format::kBf16; }

constexpr int64_t kInputBlock = 32;  // activations that share a scale, where a block type reads them

// Inputs in one step of the reduction: those that one instruction sums.
constexpr int64_t step_of(Format format) { return format == Format::kFloat ? 1 : format == Format::kBf16 ? 2 : 4; }
// Bytes of one activation as the products read it.
constexpr int64_t input_bytes(Format format) { return format == Format::kFloat ? 4 : format == Format::kBf16 ? 2 : 1; }

// A packed weight [n, k]: panels of 32 outputs, each the whole reduction in its order.
struct Weights {
    Format format;
    bool offsets;         // grouped and block types: an offset beside each scale
    bool gated;           // a panel is 16 rows of the first half beside the same rows of the second half
    int zero;             // integers: the code that stands for 0, where there are no offsets
    int64_t n, k;         // as given
    int64_t group;        // inputs that share a scale; depth where they all do
    int64_t depth;        // k, rounded up to whole steps and groups
    int64_t panels;
    int64_t panel_bytes;
    const char* data;     // aligned to 64
    const float* scales;  // kInt8: [panels * 32]
    const float* bias;    // [panels * 32] or null

    int64_t groups() const { return depth / group; }
    // Scales of one row of activations.
    int64_t input_scales() const { return is_block(format) ? depth / kInputBlock : 1; }
    // Output that lane `lane` of panel `panel` holds; may be >= n (of its half): padding.
    int64_t output(int64_t panel, int64_t lane) const {
        if (!gated) return panel * kPanel + lane;
        int64_t at = panel * kLanes + lane % kLanes;
        return at < n / 2 ? at + lane / kLanes * (n / 2) : n;
    }
};

// Whether products with both read one and the same Input.
inline bool same_input(const Weights& a, const Weights& b) {
    if (a.depth != b.depth || a.group != b.group || is_block(a.format) != is_block(b.format)) return false;
    if (!is_integer(a.format) || !is_integer(b.format)) return a.format == b.format;
    return a.zero == b.zero && a.offsets == b.offsets;
}

// Rows as a product reads them, in tiles that are computed together: [step][row of the tile][inputs of a step], or, where the
// instruction set has it so, as many steps as 64 bytes hold in place of one; of the last ones there may be fewer.
// Integers carry a scale for each row and, for each group, the sum of its integers: times minus the zero point where the
// scheme is symmetric, as it is where it has offsets.
// For block types a tile is [block of 32 inputs][row of the tile][32], each block has a scale, and where the type has
// offsets the sums are floats: minus what the inputs of the group add up to.
struct Input {
    char* data;
    float* scales;   // [rows]; block types, by tile: [block][row of the tile]
    int32_t* sums;   // by tile: [group][row of the tile]
    int64_t rows;
    int64_t tiles;

    int64_t start(int64_t tile) const {
        int64_t base = rows / tiles, more = rows % tiles;
        return tile * base + (tile < more ? tile : more);
    }
};

constexpr int64_t kScan = 64;   // logits whose highest is kept
constexpr int64_t kMass = 256;  // logits whose probabilities are summed together

enum class Mode : int { kStore, kAdd, kGate };
enum class Act : int { kSilu, kGelu, kGeluTanh, kRelu };

// What becomes of a product: out = y, out += scale * y, or out = act(first half of y) * second half.
struct Target {
    float* out;
    int64_t stride;
    Mode mode;
    Act act;
    float scale;
    char* tiles;  // kGate, no block type: instead of `out`, bfloat16 in the tiles of the product that follows
};

struct Norm {
    const float* weight;  // null: no norm at all
    float eps;
    bool centered;        // weights are kept as their distance from 1
};

enum class KvType : int { kFloat, kBf16, kInt8 };
constexpr int64_t kv_bytes(KvType type) { return type == KvType::kFloat ? 4 : type == KvType::kBf16 ? 2 : 1; }

constexpr int64_t kSub = 16;      // keys that lie together in the cache, where blocks hold whole multiples of them
constexpr int64_t kBlock = 64;    // keys of one round of the online softmax
constexpr int64_t kChunk = 512;   // keys whose softmax is summed by itself, then merged: what threads share
constexpr int64_t kExtent = 256;  // positions whose entries of all layers lie together in the cache

// One layer's attention and its cache. An extent has for each key head sub-blocks of 16 positions, keys [depth / 2][16][2]
// and values [8][depth][2] (floats: [depth][16] and [16][depth]); with blocks that are no multiple of 16 positions,
// [position][depth] for both. int8 has a float scale for each position and head.
struct Attention {
    int64_t heads, kv_heads, dim;
    int64_t depth;     // dim, rounded up to 16
    float scale;
    int64_t window;    // 0: sees all
    float softcap;     // 0: off
    KvType type;
    int64_t block_size, blocks;
    int64_t extent;    // bytes from one extent's keys (values) to those of the next
    char* keys;
    char* values;
    float* key_scales; // [kv_heads][positions]
    float* value_scales;

    bool tiled() const { return block_size % kSub == 0; }
};

// Positions [begin, end) of a row, for one key head.
struct Keys {
    const int32_t* table;
    int64_t kv_head, begin, end;
};

// One row's share of a step's attention, or a piece of it.
struct Queries {
    const float* q;           // first token's first query head of this key head
    int64_t q_stride;         // floats from token to token
    const int64_t* positions; // of the tokens
    int64_t first, count;     // queries (token * group + head of the group) of this piece
    int64_t kv_head;
    const int32_t* table;
    int64_t chunk;            // only this one; -1: all that are seen
    float* out;               // chunk < 0: [tokens, out_stride]; else a partial result: count * (depth + 2)
    int64_t out_stride;
    Keys next;                // what this thread reads after it, most likely
};

// Everything that is written once for each instruction set. `scratch` is the thread's own.
struct Kernels {
    const char* name;
    int64_t (*tile_rows)(const Weights&);  // most rows of a tile of its products' input
    int64_t query_rows;  // of attention, that are computed together
    bool lines;          // kBf16, kInt8: an Input has 64 bytes of a row side by side

    // A tile of a product's input: the norms of its rows, rounded as the product wants them.
    void (*prepare)(const Weights&, const float* const* rows, Norm, const Input&, int64_t tile);
    // Outputs of panels [first, last) for the rows of tiles [first_tile, last_tile).
    void (*product)(const Weights&, const Input&, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile, Target);
    // One output row of a weight, as floats: an embedding.
    void (*unpack)(const Weights&, int64_t row, float scale, float* out);
    // out = norm(x), or with `add` out += scale * norm(x).
    void (*norm)(const float* x, int64_t n, Norm, bool add, float scale, float* out);
    // Heads in place: norm, then rotation of the leading `turning` components.
    void (*rotate)(float* x, int64_t dim, Norm, const float* cosines, const float* sines, int64_t turning);
    // A position's key and value of one head into the cache.
    void (*keep)(const Attention&, const float* key, const float* value, int64_t kv_head, int64_t slot);
    void (*attend)(const Attention&, const Queries&, float* scratch);
    // Partial results of all chunks of one query into its output [dim].
    void (*merge)(const Attention&, const float* const* partial, int64_t stride, int64_t count, float* out);
    // logits = softcap(x / divider), in place; softcap 0: off.
    void (*cap)(float* x, int64_t n, float divider, float softcap);
    int64_t (*argmax)(const float* x, int64_t n);
    // out += factor * x.
    void (*axpy)(float* out, const float* x, float factor, int64_t n);
    // out[n] = act(wide[:n]) * wide[n:].
    void (*gate)(Act, const float* wide, int64_t n, float* out);

    // Along one row of logits, see scores.inc.h and sampling.cpp.
    bool (*scan)(float* x, int64_t n, float divider, float* highest);
    void (*weigh)(const float* x, int64_t n, float highest, double* weights);
    void (*masses)(const float* x, int64_t n, float highest, double* masses, double* surprises);
    int64_t (*gather)(const float* x, int64_t n, const float* highest, float bar, int32_t* tokens, float* values);
};

// Floats of scratch that a thread needs.
int64_t attend_scratch(const Attention&);

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
const Kernels* kernels_neon();

}  // namespace inflight
