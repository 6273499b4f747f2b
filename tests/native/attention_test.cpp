// Attention over the paged cache.
#include <algorithm>
#include <functional>

#include "tests.h"

namespace inflight::testing {
namespace {

// A layer with a cache in which every byte that nobody wrote is poison: not a number, or not 0.
struct Cache {
    Attention a;
    Exact<char> keys, values;
    Exact<float> key_scales, value_scales;
    std::vector<int32_t> table;

    Cache(Random& random, const Attention& like, int64_t context, char poison) : a(like) {
        int64_t needed = (context + a.block_size - 1) / a.block_size;
        a.blocks = needed + random.between(0, 3);
        int64_t positions = a.blocks * a.block_size * a.kv_heads, extents = (a.blocks * a.block_size - 1) / kExtent + 1;
        a.extent = kExtent * a.kv_heads * a.depth * kv_bytes(a.type);
        keys = Exact<char>(extents * a.extent, poison);
        values = Exact<char>(extents * a.extent, poison);
        a.keys = keys.get();
        a.values = values.get();
        if (a.type == KvType::kInt8) {
            key_scales = Exact<float>(positions, NAN);
            value_scales = Exact<float>(positions, NAN);
        }
        a.key_scales = key_scales.get();
        a.value_scales = value_scales.get();
        if (a.latent) a.values = nullptr, a.value_scales = a.key_scales;
        std::vector<int32_t> blocks;
        for (int32_t block = 0; block < a.blocks; block++) blocks.push_back(block);
        random.shuffle(blocks);
        table.assign(blocks.begin(), blocks.begin() + needed);
    }

    int64_t slot(int64_t position) const {
        return table[static_cast<size_t>(position / a.block_size)] * a.block_size + position % a.block_size;
    }

    // Component d of a position's key (or value), where types.h says that it lies.
    double at(bool key, int64_t head, int64_t position, int64_t d) const {
        key = key || a.latent;
        int64_t at = slot(position), row = head * kExtent + at % kExtent, j = at % 16, base = (row - j) * a.depth;
        int64_t i = row * a.depth + d;
        bool floats = a.type == KvType::kFloat;
        if (a.block_size % 16 == 0 && key) i = floats ? base + d * 16 + j : base + (d / 2 * 16 + j) * 2 + d % 2;
        if (a.block_size % 16 == 0 && !key)
            i = floats ? base + j * a.depth + d : base + (j / 2 * a.depth + d) * 2 + j % 2;
        const char* from = (key ? a.keys : a.values) + at / kExtent * a.extent + i * kv_bytes(a.type);
        if (floats) return read<float>(from);
        if (a.type == KvType::kBf16) return read_bf16(from);
        return read<int8_t>(from) *
               static_cast<double>((key ? a.key_scales : a.value_scales)[head * a.blocks * a.block_size + at]);
    }
};

struct Case {
    Attention a;
    int64_t context, tokens;          // the last ones ask
    std::vector<float> keys, values;  // [context][kv_heads][dim]
    int64_t stride;
    Exact<float> queries;  // [tokens][heads, dim], a stride apart
    std::vector<int64_t> positions;
    std::vector<int64_t> until;  // empty: every token sees the keys up to its own
    std::vector<float> sinks;    // [heads]; empty: none

    int64_t last(int64_t token) const { return (until.empty() ? positions : until)[static_cast<size_t>(token)]; }
    const int64_t* limits(int64_t token) const { return until.empty() ? nullptr : until.data() + token; }
    int64_t width() const { return a.heads * a.dim; }
    int64_t out_width() const { return a.heads * a.value_dim(); }
    int64_t group() const { return a.heads / a.kv_heads; }
    const float* row(const std::vector<float>& of, int64_t position, int64_t head) const {
        return of.data() + (position * a.kv_heads + head) * a.dim;
    }
};

void fill(const Kernels& kernels, const Case& c, const Cache& cache, int64_t first, int64_t last) {
    for (int64_t position = first; position < last; position++)
        for (int64_t head = 0; head < c.a.kv_heads; head++)
            kernels.store_kv(cache.a, c.row(c.keys, position, head), c.row(c.values, position, head), head,
                             cache.slot(position));
}

void check_kept(const Case& c, const Cache& cache) {
    for (bool key : {true, false})
        for (int64_t position = 0; position < c.context && (key || !c.a.latent); position++)
            for (int64_t head = 0; head < c.a.kv_heads; head++) {
                const float* want = c.row(key ? c.keys : c.values, position, head);
                double peak = 0.0;
                for (int64_t d = 0; d < c.a.dim; d++) peak = std::max(peak, std::fabs(static_cast<double>(want[d])));
                for (int64_t d = 0; d < c.a.depth; d++) {
                    double value = d < c.a.dim ? want[d] : 0.0, got = cache.at(key, head, position, d);
                    if (c.a.type == KvType::kFloat) CHECK(got == value, "position ", position, " component ", d);
                    if (c.a.type == KvType::kBf16)
                        CHECK(got == as_bf16(value), "position ", position, " component ", d);
                    if (c.a.type == KvType::kInt8)
                        CHECK_NEAR(got, value, 0.501 * peak / 127.0, "position ", position, " component ", d);
                }
            }
}

// Softmax(q k) v of what the cache holds, and the sizes of its sums.
void check_output(const Case& c, const Cache& cache, const Exact<float>& out, int64_t stride) {
    const Attention& a = c.a;
    bool floats = a.type == KvType::kFloat;
    std::vector<double> k, v;  // [kv_heads][context][dim]
    for (int64_t head = 0; head < a.kv_heads; head++)
        for (int64_t position = 0; position < c.context; position++)
            for (int64_t d = 0; d < a.dim; d++) {
                k.push_back(cache.at(true, head, position, d));
                v.push_back(cache.at(false, head, position, d));  // of a latent: the key's first components
            }
    for (int64_t token = 0; token < c.tokens; token++)
        for (int64_t head = 0; head < a.heads; head++) {
            const float* query = c.queries.get() + token * c.stride + head * a.dim;
            int64_t own = c.positions[static_cast<size_t>(token)] + 1, end = c.last(token) + 1,
                    begin = a.window ? std::max<int64_t>(0, own - a.window) : 0;
            int64_t base = head / c.group() * c.context;
            std::vector<double> scores;
            for (int64_t position = begin; position < end; position++) {
                double score = 0.0;
                for (int64_t d = 0; d < a.dim; d++)
                    score +=
                        (floats ? query[d] : as_bf16(query[d])) * k[static_cast<size_t>((base + position) * a.dim + d)];
                score *= a.scale;
                scores.push_back(a.softcap != 0.0f ? a.softcap * std::tanh(score / a.softcap) : score);
            }
            double peak = *std::max_element(scores.begin(), scores.end()), total = 0.0;
            if (a.sinks) peak = std::max(peak, static_cast<double>(a.sinks[head]));
            if (a.sinks) total = std::exp(a.sinks[head] - peak);
            for (double& score : scores) total += score = std::exp(score - peak);
            for (int64_t d = 0; d < a.value_dim(); d++) {
                double want = 0.0, size = 0.0;
                for (int64_t position = begin; position < end; position++) {
                    double part = scores[static_cast<size_t>(position - begin)] / total *
                                  v[static_cast<size_t>((base + position) * a.dim + d)];
                    want += part;
                    size += std::fabs(part);
                }
                CHECK_NEAR(out[token * stride + head * a.value_dim() + d], want,
                           (floats ? 3e-5 : 0x1p-8 + 3e-5) * size + 1e-7, "token at ", own - 1, " head ", head,
                           " component ", d);
            }
        }
}

// All tokens together, in random pieces, as a prompt is computed.
void prefill(const Kernels& kernels, Random& random, const Case& c, const Cache& cache, float* out, int64_t stride) {
    int64_t all = c.tokens * c.group();
    for (int64_t head = 0; head < c.a.kv_heads; head++)
        for (int64_t first = 0, count; first < all; first += count) {
            count = random.maybe() ? all - first : random.between(1, std::min<int64_t>(30, all - first));
            Exact<float> scratch(attend_scratch(c.a), NAN);
            int64_t offset = head * c.group() * c.a.dim, out_offset = head * c.group() * c.a.value_dim();
            kernels.attend(cache.a,
                           {c.queries.get() + offset,
                            c.stride,
                            c.positions.data(),
                            first,
                            count,
                            head,
                            cache.table.data(),
                            -1,
                            out + out_offset,
                            stride,
                            {},
                            c.limits(0)},
                           scratch.get());
        }
}

// Each token alone, as soon as the keys that it sees are there; its chunks of keys alone too, if `split`.
void decode(const Kernels& kernels, const Case& c, const Cache& cache, bool split, float* out, int64_t stride) {
    Exact<float> scratch(attend_scratch(c.a), NAN);
    int64_t each = c.group() * (c.a.value_depth() + 2);
    int64_t filled = c.context - c.tokens;
    fill(kernels, c, cache, 0, filled);
    for (int64_t token = 0; token < c.tokens; token++) {
        const int64_t end = c.last(token) + 1;
        fill(kernels, c, cache, filled, end);
        filled = end;
        for (int64_t head = 0; head < c.a.kv_heads; head++) {
            int64_t offset = head * c.group() * c.a.dim, chunks = (end - 1) / kChunk + 1;
            float* to = out + token * stride + head * c.group() * c.a.value_dim();
            Queries q{c.queries.get() + token * c.stride + offset,
                      c.stride,
                      c.positions.data() + token,
                      0,
                      c.group(),
                      head,
                      cache.table.data(),
                      -1,
                      to,
                      stride,
                      {},
                      c.limits(token)};
            if (token + 1 < c.tokens)
                q.next = {cache.table.data(), head, 0, c.positions[static_cast<size_t>(token)] + 1};
            if (!split) {
                kernels.attend(cache.a, q, scratch.get());
                continue;
            }
            Exact<float> partial(chunks * each, NAN);
            for (q.chunk = chunks - 1; q.chunk >= 0; q.chunk--) {
                q.out = partial.get() + q.chunk * each;
                kernels.attend(cache.a, q, scratch.get());
            }
            for (int64_t g = 0; g < c.group(); g++) {
                const float* first = partial.get() + g * (c.a.value_depth() + 2);
                kernels.merge(cache.a, head * c.group() + g, &first, each, chunks, to + g * c.a.value_dim());
            }
        }
    }
}

Case random_case(Random& random) {
    Case c{};
    Attention& a = c.a;
    a.kv_heads = random.between(1, 3);
    a.heads = a.kv_heads * random.pick<int64_t>({1, 1, 2, 3, 4, 7, 16});
    a.dim = random.pick<int64_t>({16, 20, 64, 80, 128});
    if (!random.between(0, 3)) {  // latents, in which each query's values are the key's first components
        a.kv_heads = 1;
        a.heads = random.pick<int64_t>({1, 5, 16, 20});
        a.dim = random.pick<int64_t>({22, 48, 84, 288});
        a.latent = random.pick<int64_t>({a.dim - 2, a.dim - 16 > 0 ? a.dim - 16 : 4, a.dim / 2});
    }
    a.depth = (a.dim + 15) / 16 * 16;
    a.scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
    a.type = random.pick({KvType::kFloat, KvType::kBf16, KvType::kInt8});
    a.block_size = random.pick<int64_t>({16, 32, 48, 4, 5, 24});
    a.window = random.pick<int64_t>({0, 0, 1, 7, 64, 100, 600});
    a.softcap = random.pick({0.0f, 0.0f, 20.0f});
    c.context = random.pick<int64_t>({1, 15, 16, 17, 33, 63, 64, 65, 129, 511, 512, 513, 1030, random.between(1, 200)});
    c.tokens = std::min(c.context, random.between(1, c.context > 200 ? 3 : 9));
    c.keys = random.values(c.context * a.kv_heads * a.dim, 1.5f);
    c.values = random.values(c.context * a.kv_heads * a.dim);
    c.stride = c.width() + random.pick<int64_t>({0, 5});
    c.queries = Exact<float>((c.tokens - 1) * c.stride + c.width(), NAN);
    for (int64_t token = 0; token < c.tokens; token++) {
        for (int64_t i = 0; i < c.width(); i++) c.queries[token * c.stride + i] = random.value(1.5f);
        c.positions.push_back(c.context - c.tokens + token);
    }
    if (random.maybe()) {
        c.sinks = random.values(a.heads, random.pick({1.0f, 8.0f}));
        a.sinks = c.sinks.data();
    }
    if (random.maybe()) {  // some tokens see each other, as those of an image
        c.until = c.positions;
        const int64_t first = random.between(0, c.tokens - 1), last = random.between(first, c.tokens - 1);
        for (int64_t token = first; token < last; token++)
            c.until[static_cast<size_t>(token)] = c.positions[static_cast<size_t>(last)];
    }
    return c;
}

void one(const Kernels& kernels, Random& random) {
    Case c = random_case(random);
    const Attention& a = c.a;
    try {
        Cache cache(random, a, c.context, -1), growing(random, a, c.context, -1), other(random, a, c.context, 0x7f);
        fill(kernels, c, cache, 0, c.context);
        check_kept(c, cache);
        int64_t stride = c.out_width() + random.pick<int64_t>({0, 3}), size = (c.tokens - 1) * stride + c.out_width();
        Exact<float> whole(size, kUnset), alone(size, kUnset), split(size, kUnset);
        prefill(kernels, random, c, cache, whole.get(), stride);
        check_output(c, cache, whole, stride);
        for (int64_t token = 0; token + 1 < c.tokens; token++)
            for (int64_t i = c.out_width(); i < stride; i++)
                CHECK(whole[token * stride + i] == kUnset, "written between two rows");
        decode(kernels, c, growing, false, alone.get(), stride);
        CHECK(same_bits(whole.get(), alone.get(), size), "a token alone differs from the same one in a prompt");
        decode(kernels, c, other, true, split.get(), stride);
        CHECK(same_bits(whole.get(), split.get(), size), "chunks that are merged differ from one run over them");
    } catch (const std::runtime_error& error) {
        fail("heads ", a.heads, "/", a.kv_heads, ", dim ", a.dim, "/", a.value_dim(), ", cache ",
             static_cast<int>(a.type), ", blocks of ", a.block_size, ", window ", a.window, ", softcap ", a.softcap,
             ", context ", c.context, ", tokens ", c.tokens, ": ", error.what());
    }
}

}  // namespace

void attention(const Kernels& kernels, Random& random) {
    for (int repeat = 0; repeat < 60; repeat++) one(kernels, random);
}

}  // namespace inflight::testing
