// Multi-head latent attention (DeepSeek-AI, 2024, "DeepSeek-V2") in its absorbed form: products of each head with its
// own weight, and what is stored of a token.
#include <algorithm>
#include <cstring>

#include "worker.h"

namespace inflight {

// Rows of one head's product that pass its weight together.
int64_t Program::head_rows(const Weights& w, int64_t rows) const {
    return std::min(rows, kHeadTiles * most_tile_rows(w));
}

// Columns of `to` of each head = the head's weight times its columns of `from`. A unit is a head with some rows, which
// the thread prepares for itself.
void Program::Worker::multiply_heads(const Operation& op) {
    const int64_t heads = static_cast<int64_t>(op.products.size()), rows = slice().step.count;
    const int64_t from_width = width(op.from), to_width = width(op.to);
    const int64_t from_step = from_width / heads, to_step = to_width / heads;
    const Weights& any = program.weights(op.products[0]);
    const int64_t band = program.head_rows(any, rows), bands = ceil_div(rows, band);
    each(heads * bands, [&](int64_t unit) {
        const int64_t head = unit / bands, first = unit % bands * band, count = std::min(band, rows - first);
        const Weights& w = program.weights(op.products[static_cast<size_t>(head)]);
        const Input in{head_input.get(), head_scales.get(), head_sums.get(), count,
                       ceil_div(count, program.most_tile_rows(w))};
        for (int64_t tile = 0; tile < in.tiles; tile++) {
            const float* x[kMostRows];
            const int64_t start = in.start(tile), end = in.start(tile + 1);
            for (int64_t row = start; row < end; row++)
                x[row - start] = buffer(op.from) + (first + row) * from_width + head * from_step;
            kernels().prepare(w, x, Norm{nullptr, 0.0f, false}, in, tile);
        }
        kernels().product(
            w, in, 0, w.panels, 0, in.tiles,
            {buffer(op.to) + first * to_width + head * to_step, to_width, Mode::kStore, op.act, 1.0f, nullptr});
    });
}

// Puts the rotated parts of a token's queries behind what is multiplied with latents, and stores its latent, normed,
// with the one rotated key.
void Program::Worker::store_latent(const Operation& op) {
    const Attention& a = program.layers_[static_cast<size_t>(op.layer)];
    const Step& step = slice().step;
    const Norm norm = norm_of(op.norm, op), none{nullptr, 0.0f, false};
    const size_t rope = static_cast<size_t>(op.rope);
    const int64_t rotary = a.dim - a.latent, half = static_cast<int64_t>(program.ropes_[rope].inverse.size());
    const int64_t own = width(op.from) / a.heads;
    each(step.count, [&](int64_t i) {
        const float* cos = program.cos_sin_[rope].get() + i * 2 * half;
        const float* from = buffer(op.from) + i * width(op.from) + own - rotary;
        float* to = buffer(op.to) + i * width(op.to) + a.latent;
        for (int64_t head = 0; head < a.heads; head++, from += own, to += a.dim) {
            std::memcpy(to, from, static_cast<size_t>(rotary) * 4);
            kernels().rotate(to, rotary, none, cos, cos + half, 2 * half);
        }
        float* key = buffer(op.into) + i * width(op.into);
        kernels().norm(key, a.latent, norm, false, 1.0f, key);
        kernels().rotate(key + a.latent, rotary, none, cos, cos + half, 2 * half);
        kernels().store_kv(a, key, nullptr, 0, step.slots[i]);
    });
}

}  // namespace inflight
