// A small decoder with random weights: as a program, and in double precision.
#pragma once

#include "program.h"
#include "testing.h"

namespace inflight::testing {

struct Matrix {
    int64_t n, k;
    std::vector<float> values, bias;
};

struct DecoderLayer {
    Attention attention{};
    int rope = 0;
    bool head_norms = false, post_norm = false;  // norms of queries and keys; of what attention gives
    int64_t chosen = 0;                          // experts of a token; 0: one MLP for all
    bool normalise = false;
    Activation act = Activation::kSilu;
    Matrix qkv, out, router;
    std::vector<Matrix> gate_up, down;
    std::vector<float> input_norm, query_norm, key_norm, attention_norm, mlp_norm;
};

struct Decoder {
    int64_t hidden = 0, inner = 0, vocabulary = 0;
    Format format = Format::kFloat, table_format = Format::kFloat;
    bool parts = false;  // queries, keys and values are products of their own, gate and up too
    int64_t group = 32;
    KvType kv = KvType::kFloat;
    int64_t block_size = 16;
    bool centered = false;
    float embedding_scale = 1.0f, residual_scale = 1.0f, divider = 1.0f, softcap = 0.0f;
    std::vector<Rope> ropes;
    std::vector<DecoderLayer> layers;
    Matrix table, head;
    std::vector<float> last_norm;
};

constexpr float kEps = 1e-5f;

Decoder random_decoder(Random& random, Format format, int64_t hidden = 0);

// The decoder's program on so many threads, with its own cache of so many blocks.
struct Engine {
    Program program;
    int logits = 0, last = 0;
    int64_t block_size, vocabulary, hidden;

    Engine(const Decoder& decoder, const Kernels& kernels, int threads, int64_t blocks);
};

// Logits [tokens][vocabulary] of a prompt, of decoders whose weights and cache are floats; shorter where the choice of
// experts is too close to call. Tokens turn as those of a sequence of `reach` tokens at least.
std::vector<double> reference(const Decoder& decoder, const std::vector<int64_t>& tokens, int64_t reach);

}  // namespace inflight::testing
