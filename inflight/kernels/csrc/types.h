// The types that the files of the CPU engine share. docs/cpu-engine.md draws the layouts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora.h"

namespace inflight {

constexpr int64_t kLanes = 16;          // outputs in one line of 64 bytes
constexpr int64_t kPanel = 2 * kLanes;  // outputs that are computed together: two lines

// How a packed weight holds its values. kInt8 has one float scale for each output, kGroup8 and kGroup4 a float16 scale
// for each `group` inputs. The formats from kQ8_0 on are llama.cpp's block types, each at its own number of bits
// (blocks.h).
enum class Format : int {
    kFloat,
    kBf16,
    kInt8,
    kGroup8,
    kGroup4,
    kQ8_0,
    kQ4_0,
    kQ4_1,
    kQ5_0,
    kQ5_1,
    kQ2_K,
    kQ3_K,
    kQ4_K,
    kQ5_K,
    kQ6_K,
    kIq4Nl,
    kIq4Xs,
    kMxfp4,
};
constexpr int kFormats = 18;

constexpr bool is_grouped(Format format) { return format == Format::kGroup8 || format == Format::kGroup4; }
constexpr bool is_block(Format format) { return format >= Format::kQ8_0; }
constexpr bool is_integer(Format format) { return format != Format::kFloat && format != Format::kBf16; }

constexpr int64_t kInputBlock = 32;  // activations that share a scale in products with block types

// Inputs in one step of the reduction: as many as one instruction sums.
constexpr int64_t step_of(Format format) { return format == Format::kFloat ? 1 : format == Format::kBf16 ? 2 : 4; }
// Bytes of one activation as the products read it.
constexpr int64_t input_bytes(Format format) { return format == Format::kFloat ? 4 : format == Format::kBf16 ? 2 : 1; }

// Bytes of one row of inputs as three bfloat16 each, which sum up to the float: blocks of 32 inputs.
constexpr int64_t split_row_bytes(int64_t inputs) { return (inputs + 31) / 32 * 32 * 6; }

// A packed weight [n, k]: panels of 32 outputs, each the whole reduction in its order.
struct Weights {
    Format format;
    bool offsets;   // grouped and block types: there is an offset beside each scale
    bool gated;     // a panel is 16 outputs of the first half beside the same 16 of the second half
    int zero;       // integers: the code that stands for 0; unused with offsets
    int64_t n, k;   // outputs and inputs
    int64_t group;  // inputs that share a scale; `depth` if all of them do
    int64_t depth;  // k, rounded up to whole steps and groups
    int64_t panels;
    int64_t panel_bytes;
    const char* data;     // aligned to 64
    const float* scales;  // kInt8: [panels * 32]
    const float* bias;    // [panels * 32] or null
    bool split;           // kFloat: products sum those of bfloat16 parts (amx_split.inc.h); sets with `splits`

    int64_t groups() const { return depth / group; }
    // Bytes of one row of activations as the products read it.
    int64_t input_row() const { return split ? split_row_bytes(depth) : depth * input_bytes(format); }
    // Scales of one row of activations.
    int64_t input_scales() const { return is_block(format) ? depth / kInputBlock : 1; }
    // The output in lane `lane` of panel `panel`; a number >= n means that the lane is padding.
    int64_t output(int64_t panel, int64_t lane) const {
        if (!gated) return panel * kPanel + lane;
        int64_t at = panel * kLanes + lane % kLanes;
        return at < n / 2 ? at + lane / kLanes * (n / 2) : n;
    }
};

// Whether products with `a` and with `b` can read the same Input.
inline bool same_input(const Weights& a, const Weights& b) {
    if (a.depth != b.depth || a.group != b.group || is_block(a.format) != is_block(b.format)) return false;
    if (!is_integer(a.format) || !is_integer(b.format)) return a.format == b.format;
    return a.zero == b.zero && a.offsets == b.offsets;
}

// The rows that a product reads, rounded to its format, in tiles of rows that are computed together. A tile is
// [step][row][inputs of a step]. Instruction sets with `Kernels::lines` put all the steps that fit 64 bytes of a row
// side by side: [steps / n][row][n steps]; the last group may be shorter. Integer formats have a scale for each row
// and, for each group of inputs, the sum of the group's integers. The sum is stored as it is for weights with offsets,
// and times minus the zero point for symmetric weights. Block types have tiles of [block of 32 inputs][row][32] with a
// scale for each block of a row. If the type has offsets, `sums` holds floats: minus the sum of the group's inputs. For
// split weights a tile is [block of 32 inputs][part][row][32 bfloat16].
struct Input {
    char* data;
    float* scales;  // [rows]; block types, by tile: [block][row of the tile]
    int32_t* sums;  // by tile: [group][row of the tile]
    int64_t rows;
    int64_t tiles;

    int64_t start(int64_t tile) const {
        int64_t base = rows / tiles, more = rows % tiles;
        return tile * base + (tile < more ? tile : more);
    }
};

constexpr int64_t kScan = 64;   // logits of which `scan` keeps the largest
constexpr int64_t kMass = 256;  // logits whose probabilities `masses` sums

enum class Mode : int { kStore, kAdd, kGate, kActivate };
// kSwigluClamped: of gated products only, see `gated`.
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kGeluQuick, kSwigluClamped, kReluSquared };

// Where a product's result y goes: out = y, out += scale * y, out = act(first half of y) * second half, or out =
// act(y).
struct Target {
    float* out;
    int64_t stride;
    Mode mode;
    Activation act;
    float scale;
    char* tiles;  // kGate, kActivate, no block type: in the tiles the next product reads; null: to `out`
};

struct Norm {
    const float* weight;  // null: no norm
    float eps;
    bool centered;  // `weight` is the distance from 1
};

enum class KvType : int { kFloat, kBf16, kInt8 };
constexpr int64_t kv_bytes(KvType type) { return type == KvType::kFloat ? 4 : type == KvType::kBf16 ? 2 : 1; }

constexpr int64_t kSub =
    16;  // keys of a sub-block, which lie together in the cache if a block holds a multiple of them
constexpr int64_t kBlock = 64;   // keys of one round of the online softmax
constexpr int64_t kChunk = 512;  // keys whose softmax is computed separately and then merged; threads share by chunks
constexpr int64_t kSharedTiles = 8;  // of queries that share a chunk's values, where these are turned out of keys
constexpr int64_t kExtent = 256;     // positions whose entries of all layers lie together in the cache

// One layer's attention and its cache. An extent holds, for each key head, sub-blocks of 16 positions: keys
// [depth / 2][16][2] and values [8][depth][2]; of floats [depth][16] and [16][depth]. If the block size is not a
// multiple of 16, both are [position][depth]. int8 has a float scale for each position and head.
struct Attention {
    int64_t heads, kv_heads, dim;
    int64_t depth;  // dim, rounded up to 16
    float scale;
    int64_t window;  // keys that a query sees; 0: all
    float softcap;   // 0: off
    KvType type;
    int64_t block_size, blocks;
    int64_t extent;  // bytes from one extent's keys (values) to those of the next
    char* keys;
    char* values;
    float* key_scales;  // [kv_heads][positions]
    float* value_scales;
    const float* sinks = nullptr;  // [heads] logits of a key without a value that every query sees; null: none
    int source = -1;               // the layer whose keys and values this one reads in place of its own; -1: its own
    int64_t latent =
        0;  // the first components of a key, which are its value too: the cache has keys only; 0: it has both
    bool causal = false;  // no query sees a key behind its own, whatever the step says of images

    bool tiled() const { return block_size % kSub == 0; }
    // Components of a value, as they are and rounded up to 16.
    int64_t value_dim() const { return latent ? latent : dim; }
    int64_t value_depth() const { return (value_dim() + kLanes - 1) / kLanes * kLanes; }
};

// Positions [begin, end) of a row, for one key head.
struct Keys {
    const int32_t* table;
    int64_t kv_head, begin, end;
};

constexpr int64_t kWholeKeys = 512;  // of the longest text that is a WholeText

// Queries of one head that see all keys of their text.
struct WholeText {
    const float* queries;  // [count]
    const float* keys;     // [length]
    const float* values;   // [length]
    int64_t stride;        // floats from row to row of these three
    int64_t count, length;
    int64_t dim;  // a multiple of 16
    float scale;
    float* out;  // [count]
    int64_t out_stride;
};

// Consecutive queries of one row that share a key head.
struct Queries {
    const float* q;            // first token's first query head of this key head
    int64_t q_stride;          // floats from token to token
    const int64_t* positions;  // of the tokens
    int64_t first, count;      // of these queries; query number = token * group + head within the group
    int64_t kv_head;
    const int32_t* table;
    int64_t chunk;  // the chunk of keys to attend to; -1: all
    float* out;     // chunk < 0: [tokens, out_stride]; else a partial result: count * (value depth + 2)
    int64_t out_stride;
    Keys next;                       // keys that this thread probably reads afterwards, to be prefetched
    const int64_t* until = nullptr;  // position of the last key that each token sees; null: its own
    // Added to the scores before their scale, by token and position; readable to the end of a sub-block. Each head of
    // queries has keys of its own then.
    const float* bias = nullptr;
    int64_t bias_stride = 0;  // floats from token to token
};

constexpr int64_t kDeltaTokens = 16;  // that a key head takes at once

// A recurrent layer: the gated delta rule behind a short causal convolution (Yang et al., 2024, "Gated Delta
// Networks"). It reads rows of queries, keys and values of all heads (`channels`), then z of all value heads, β's and
// the decays' logits. A row's state lies in a slot, by key head: the last inputs of the head's convolutions
// [taps - 1][own channels], then the memory of each of its value heads, [columns / 16][key_dim][16].
struct Delta {
    int64_t key_heads, value_heads, key_dim, value_dim;
    int64_t taps;        // of the convolution, 2 to 8
    bool tiled;          // value head j belongs to key head j % key_heads; else to j / shared()
    float eps;           // of the norm of a head's result
    const float* conv;   // [taps][channels]
    const float* decay;  // [value_heads], -exp(A_log)
    const float* dt_bias;
    const float* norm;  // [value_dim]
    int64_t at;         // where the layer's part of a slot begins, in floats

    int64_t shared() const { return value_heads / key_heads; }
    int64_t value_head(int64_t key_head, int64_t i) const {
        return tiled ? i * key_heads + key_head : key_head * shared() + i;
    }
    int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
    int64_t width() const { return channels() + value_heads * value_dim + 2 * value_heads; }
    int64_t own_channels() const { return 2 * key_dim + shared() * value_dim; }
    int64_t conv_floats() const { return ((taps - 1) * own_channels() + kLanes - 1) / kLanes * kLanes; }
    int64_t memory_floats() const { return (value_dim + kLanes - 1) / kLanes * kLanes * key_dim; }
    int64_t head_floats() const { return conv_floats() + shared() * memory_floats(); }
    int64_t floats() const { return key_heads * head_floats(); }
    // Floats of scratch that a thread needs.
    int64_t scratch_floats() const { return kDeltaTokens * (own_channels() + value_dim + 2); }
};

constexpr int64_t kConvChannels = 64;  // of a convolution, in one unit of work

constexpr int64_t conv_units(int64_t channels) { return (channels + kConvChannels - 1) / kConvChannels; }

// A gated short convolution (LFM2): C * (convolution of B * x). It reads rows of B, C and x, `channels` of each. A
// row's state is the last taps - 1 inputs of the convolution, by units of 64 channels: [units][taps - 1][64].
struct ShortConv {
    int64_t channels, taps;  // taps: 2 to 8
    const float* conv;       // [taps][channels]
    const float* bias;       // [channels] or null
    int64_t at;              // where the layer's part of a slot begins, in floats

    int64_t unit_floats() const { return (taps - 1) * kConvChannels; }
    int64_t floats() const { return conv_units(channels) * unit_floats(); }
};

// A selective state space layer (Dao and Gu, 2024, "Transformers are SSMs"; Mamba 2). It reads rows of the gate z and
// of x of all heads, then B and C of all groups of heads, then the heads' steps. x, B and C pass a convolution. A row's
// state: the convolution's last inputs as ShortConv has them, then each head's memory [columns / 16][state][16].
struct Mamba {
    int64_t heads, head_dim, groups, state;
    int64_t taps;                  // of the convolution, 2 to 8
    float gate_scale, step_scale;  // of z and of the steps
    float least, most;             // a step's bounds
    bool norm_first;               // the norm comes before the gate
    float eps;                     // of the norm
    const float* conv;             // [taps][channels]
    const float* conv_bias;        // [channels] or null
    const float* decay;            // [heads], -exp(A_log)
    const float* step_bias;        // [heads]
    const float* skip;             // [heads], D
    const float* norm;             // [inner], by group; null: none
    int64_t at;                    // where the layer's part of a slot begins, in floats

    int64_t inner() const { return heads * head_dim; }
    int64_t channels() const { return inner() + 2 * groups * state; }
    int64_t width() const { return inner() + channels() + heads; }
    int64_t unit_floats() const { return (taps - 1) * kConvChannels; }
    int64_t conv_floats() const { return conv_units(channels()) * unit_floats(); }
    int64_t memory_floats() const { return (head_dim + kLanes - 1) / kLanes * kLanes * state; }
    int64_t floats() const { return conv_floats() + heads * memory_floats(); }
};

// Consecutive tokens of one row in a recurrent layer.
struct RowTokens {
    int64_t tokens;
    float* x;  // [tokens][stride]; what passes a convolution may be overwritten
    int64_t stride;
    float* out;  // [tokens][out_stride]
    int64_t out_stride;
};

// The functions that are compiled once for each instruction set.
struct Kernels {
    const char* name;
    int64_t (*tile_rows)(const Weights&);  // most rows of a tile of its products' input
    int64_t query_rows;                    // queries that attention computes together
    bool lines;                            // kBf16, kInt8: an Input has 64 bytes of a row side by side
    bool splits;                           // computes with `Weights::split`

    // Writes a tile of a product's input: the norms of its rows, rounded to the weight's format.
    void (*prepare)(const Weights&, const float* const* rows, Norm, const Input&, int64_t tile);
    // Outputs of panels [first, last) for the rows of tiles [first_tile, last_tile).
    void (*product)(const Weights&, const Input&, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile,
                    Target);
    // One output of a weight as floats [k]: an embedding.
    void (*unpack)(const Weights&, int64_t row, float scale, float* out);
    // out = norm(x), or with `add` out += scale * norm(x).
    void (*norm)(const float* x, int64_t n, Norm, bool add, float scale, float* out);
    // Heads in place: norm, then rotation of the leading `rotary_dim` components.
    void (*rotate)(float* x, int64_t dim, Norm, const float* cosines, const float* sines, int64_t rotary_dim);
    // Writes a position's key and value of one head to the cache.
    void (*store_kv)(const Attention&, const float* key, const float* value, int64_t kv_head, int64_t slot);
    // `scratch` belongs to the calling thread, see attend_scratch.
    void (*attend)(const Attention&, const Queries&, float* scratch);
    // `scratch`: 16 * (dim + length) floats.
    void (*attend_whole)(const WholeText&, float* scratch);
    // Merges one query's partial results of all chunks into its output [dim]; `head`: the query's.
    void (*merge)(const Attention&, int64_t head, const float* const* partial, int64_t stride, int64_t count,
                  float* out);
    // logits = softcap(x / divider), in place; softcap 0: off.
    void (*cap)(float* x, int64_t n, float divider, float softcap);
    int64_t (*argmax)(const float* x, int64_t n);
    // out += factor * x.
    void (*axpy)(float* out, const float* x, float factor, int64_t n);
    // out = act(scale * gate) * up, see `gated`.
    void (*gate)(Activation, const float* gate, float scale, const float* up, int64_t n, float* out);
    // out = (x - mean) / sqrt(variance + eps) * weight + bias; bias may be null.
    void (*layer_norm)(const float* x, int64_t n, const float* weight, const float* bias, float eps, float* out);
    // One key head with its value heads, whose part of the row's state is `state`.
    void (*delta)(const Delta&, const RowTokens&, int64_t key_head, float* state, float* scratch);
    // A unit's channels of a gated short convolution.
    void (*short_conv)(const ShortConv&, const RowTokens&, int64_t unit, float* state);
    // Mamba 2 in three stages: a unit's channels of the convolution, in place; one head, whose memory is `state`, with
    // 2 floats a token of scratch; one token's gate and norm, in place.
    void (*mamba_conv)(const Mamba&, const RowTokens&, int64_t unit, float* state);
    void (*mamba_head)(const Mamba&, const RowTokens&, int64_t head, float* state, float* scratch);
    void (*mamba_norm)(const Mamba&, const float* z, float* out);
    // out *= σ(x); `broadcast`: all by σ(x[0]).
    void (*output_gate)(const float* x, bool broadcast, int64_t n, float* out);
    // xIELU (Huang and Schlag, 2024) in place: squares * x² + all * x above 0, (exponentials + all) * (e ** x - 1 - x)
    // + all * x below.
    void (*xielu)(float squares, float exponentials, float all, int64_t n, float* x);

    // Rows [first, last) of first factors with the inputs of tokens, which are readable up to the factors' depth.
    void (*shrink)(const LowFirst&, const float* const* x, int64_t tokens, int64_t first, int64_t last,
                   float* const* out);
    // Adds panels [first, last) of a second factor's outputs to those of tokens.
    void (*expand)(const LowSecond&, const float* const* hidden, int64_t tokens, int64_t first, int64_t last,
                   float* const* out);
    // out[n] = act(a) * b of a gated product's panels as they are: 16 outputs of a beside 16 of b.
    void (*gate_panels)(Activation, const float* wide, int64_t n, float* out);

    // Over one row of logits, see scores.inc.h and sampling.cpp.
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
