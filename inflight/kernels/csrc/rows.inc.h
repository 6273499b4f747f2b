// Functions over one row: rounding to the inputs of products, rotation, entries of the cache.
namespace inflight {
namespace {

constexpr int kMostRows = kDirectRows > kGroupedRows ? kDirectRows : kGroupedRows;

constexpr int64_t kStretch = 256;  // inputs of a tile's rows that are rounded together: they fit the first-level cache

// Rounds the rows of one tile. Each row is read twice: for its norm and its scale, then stretch by stretch.
void prepare(const Weights& w, const float* const* rows, Norm norm, const Input& in, int64_t tile) {
    if (is_block(w.format)) return prepare_blocks(w, rows, norm, in, tile);
    int64_t start = in.start(tile), count = in.start(tile + 1) - start;
    bool integers = is_integer(w.format);
    F factors[kMostRows], inverses[kMostRows];
    I sums[kMostRows];
    auto value = [&](int64_t row, int64_t i) {
        F x = load_part(rows[row] + i, w.k - i);
        return norm.weight ? normed(x, factors[row], norm, i, w.k - i) : x;
    };
    for (int64_t row = 0; row < count; row++) {
        if (norm.weight) factors[row] = splat(norm_factor(rows[row], w.k, norm.eps));
        if (!integers) continue;
        F most = zero();
        for (int64_t i = 0; i < w.k; i += kLanes) most = max(most, absolute(value(row, i)));
        float peak = highest(most);
        in.scales[start + row] = peak / 127.0f;
        inverses[row] = splat(peak > 0.0f ? 127.0f / peak : 0.0f);
        sums[row] = whole(0);
    }
    char* to = in.data + start * w.depth * input_bytes(w.format);
    int32_t* group_sums = in.sums + start * w.groups();
    int64_t stride = 4 * count;  // every step is 4 bytes of a row
    int64_t group = integers ? w.depth / w.groups() : w.depth;
    int32_t zero_point = w.offsets ? 1 : -w.zero;
    for (int64_t begin = 0; begin < w.depth;) {
        int64_t group_end = (begin / group + 1) * group,
                end = begin + kStretch < group_end ? begin + kStretch : group_end;
        for (int64_t row = 0, together; row < count; row += together) {
            together = count - row < 4 ? 1 : 4;
            for (int64_t i = begin; i < end; i += kLanes) {
                int64_t inputs = end - i < kLanes ? end - i : kLanes, steps = inputs / step_of(w.format);
                alignas(64) char bits[4][64];
                for (int64_t r = 0; r < together; r++) {
                    F x = i < w.k ? value(row + r, i) : zero();
                    if (inputs < kLanes) x = keep_lanes(x, 0, inputs, zero());  // the others belong to the next group
                    if (w.format == Format::kFloat) store(reinterpret_cast<float*>(bits[r]), x);
                    if (w.format == Format::kBf16) to_bf16(x, reinterpret_cast<uint16_t*>(bits[r]));
                    if (!integers) continue;
                    I codes = to_int8(mul(x, inverses[row + r]), reinterpret_cast<int8_t*>(bits[r]));
                    sums[row + r] = add(sums[row + r], codes);
                }
                char* at = to + i / step_of(w.format) * stride + 4 * row;
                if (together == 4)
                    spread(bits, steps, at, stride);
                else
                    spread(bits[0], steps, at, stride);
            }
            for (int64_t r = row; r < row + together && end == group_end && integers; r++) {
                group_sums[end / group * count - count + r] =
                    static_cast<int32_t>(static_cast<uint32_t>(sum(sums[r])) * static_cast<uint32_t>(zero_point));
                sums[r] = whole(0);
            }
        }
        begin = end;
    }
}

void unpack(const Weights& w, int64_t row, float scale, float* out) {
    if (is_block(w.format)) return unpack_blocks(w, row, scale, out);
    int64_t panel = row / kPanel, lane = row % kPanel;
    const char* at = w.data + panel * w.panel_bytes;
    int64_t step = step_of(w.format);
    for (int64_t k = 0; k < w.k; k++) {
        if (w.format == Format::kFloat) {
            float value;
            std::memcpy(&value, at + k * 128 + lane * 4, 4);
            out[k] = value * scale;
        } else if (w.format == Format::kBf16) {
            uint16_t half;
            std::memcpy(&half, at + k / step * 128 + lane * 4 + k % step * 2, 2);
            uint32_t bits = static_cast<uint32_t>(half) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            out[k] = value * scale;
        } else if (w.format == Format::kInt8) {
            uint8_t code = static_cast<uint8_t>(at[k / step * 128 + lane * 4 + k % step]);
            out[k] = static_cast<float>(code - 128) * w.scales[row] * scale;
        } else {
            int64_t head = w.offsets ? 128 : 64, bytes = w.format == Format::kGroup4 ? w.group * 16 : w.group * 32;
            const char* group = at + k / w.group * (head + bytes);
            int64_t i = k % w.group;
            alignas(64) float scales[16], offsets[16];
            store(scales, float16(group + lane / kLanes * 32));
            if (w.offsets) store(offsets, float16(group + 64 + lane / kLanes * 32));
            int code;
            if (w.format == Format::kGroup4) {
                uint8_t both = static_cast<uint8_t>(group[head + i / 8 * 128 + lane * 4 + i % 4]);
                code = i % 8 < 4 ? both & 0x0f : both >> 4;
            } else {
                code = static_cast<uint8_t>(group[head + i / 4 * 128 + lane * 4 + i % 4]);
            }
            float at_scale = scales[lane % kLanes];
            if (w.offsets)
                out[k] = (static_cast<float>(code) * at_scale - offsets[lane % kLanes]) * scale;
            else
                out[k] = static_cast<float>(code - (w.format == Format::kGroup4 ? 8 : 128)) * at_scale * scale;
        }
    }
}

void rotate(float* x, int64_t dim, Norm norm, const float* cosines, const float* sines, int64_t rotary_dim) {
    if (norm.weight) norm_row(x, dim, norm, false, 1.0f, x);
    int64_t half = rotary_dim / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        int64_t left = half - i;
        F a = load_part(x + i, left), b = load_part(x + half + i, left);
        F c = load_part(cosines + i, left), s = load_part(sines + i, left);
        store_part(x + i, sub(mul(a, c), mul(b, s)), left);
        store_part(x + half + i, add(mul(b, c), mul(a, s)), left);
    }
}

template <class T>
INLINE void put(const Attention& a, const T* key, const T* value, int64_t kv_head, int64_t slot) {
    int64_t j = a.tiled() ? slot % kSub : 0, at = kv_offset(a, kv_head, slot - j);
    T* keys = reinterpret_cast<T*>(a.keys + at);
    T* values = reinterpret_cast<T*>(a.values + at);
    if (!a.tiled()) {
        std::memcpy(keys, key, static_cast<size_t>(a.depth) * sizeof(T));
        if (!a.latent) std::memcpy(values, value, static_cast<size_t>(a.depth) * sizeof(T));
        return;
    }
    if (sizeof(T) == 4) {
        for (int64_t d = 0; d < a.depth; d++) keys[d * kSub + j] = key[d];
        if (!a.latent) std::memcpy(values + j * a.depth, value, static_cast<size_t>(a.depth) * sizeof(T));
        return;
    }
    for (int64_t d = 0; d < a.depth; d += 2) std::memcpy(keys + (d / 2 * kSub + j) * 2, key + d, 2 * sizeof(T));
    if (a.latent) return;
    T* row = values + j / 2 * a.depth * 2 + j % 2;
    for (int64_t d = 0; d < a.depth; d++) row[2 * d] = value[d];
}

float rounded_to_int8(const float* x, int64_t n, int8_t* out) {
    F most = zero();
    for (int64_t i = 0; i < n; i += kLanes) most = max(most, absolute(load_part(x + i, n - i)));
    float peak = highest(most);
    F inverse = splat(peak > 0.0f ? 127.0f / peak : 0.0f);
    for (int64_t i = 0; i < n; i += kLanes) to_int8(mul(load_part(x + i, n - i), inverse), out + i);
    return peak / 127.0f;
}

void store_kv(const Attention& a, const float* key, const float* value, int64_t kv_head, int64_t slot) {
    if (a.type == KvType::kFloat) {
        alignas(64) float k[kMostDepth], v[kMostDepth];
        for (int64_t d = 0; d < a.depth; d += kLanes) {
            store(k + d, load_part(key + d, a.dim - d));
            store(v + d, a.latent ? zero() : load_part(value + d, a.dim - d));
        }
        put<float>(a, k, v, kv_head, slot);
    } else if (a.type == KvType::kBf16) {
        alignas(64) uint16_t k[kMostDepth], v[kMostDepth];
        for (int64_t d = 0; d < a.depth; d += kLanes) {
            to_bf16(load_part(key + d, a.dim - d), k + d);
            if (!a.latent) to_bf16(load_part(value + d, a.dim - d), v + d);
        }
        put<uint16_t>(a, k, v, kv_head, slot);
    } else {
        alignas(64) int8_t k[kMostDepth], v[kMostDepth];
        int64_t at = scale_index(a, kv_head, slot);
        a.key_scales[at] = rounded_to_int8(key, a.dim, k);
        if (!a.latent) a.value_scales[at] = rounded_to_int8(value, a.dim, v);
        put<int8_t>(a, k, v, kv_head, slot);
    }
}

void cap(float* x, int64_t n, float divider, float softcap) {
    for (int64_t i = 0; i < n; i += kLanes) {
        F y = div(load_part(x + i, n - i), splat(divider));
        if (softcap != 0.0f) y = mul(hyperbolic_tangent(div(y, splat(softcap))), splat(softcap));
        store_part(x + i, y, n - i);
    }
}

void gate(Activation act, const float* gate, float scale, const float* up, int64_t n, float* out) {
    const F factor = splat(scale);
    for (int64_t i = 0; i < n; i += kLanes)
        store_part(out + i, gated(act, mul(load_part(gate + i, n - i), factor), load_part(up + i, n - i)), n - i);
}

// The mean first, then the squares of the distances from it: one pass for both loses digits where the mean is large.
void layer_norm(const float* x, int64_t n, const float* weight, const float* bias, float eps, float* out) {
    F total = zero(), squares = zero();
    for (int64_t i = 0; i < n; i += kLanes) total = add(total, load_part(x + i, n - i));
    const F mean = splat(sum(total) / static_cast<float>(n));
    for (int64_t i = 0; i < n; i += kLanes) {
        F v = keep_lanes(sub(load_part(x + i, n - i), mean), 0, n - i, zero());
        squares = fma(v, v, squares);
    }
    const F factor = splat(1.0f / sqrtf(sum(squares) / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += kLanes) {
        F y = mul(sub(load_part(x + i, n - i), mean), factor);
        const F w = load_part(weight + i, n - i);
        store_part(out + i, bias ? fma(y, w, load_part(bias + i, n - i)) : mul(y, w), n - i);
    }
}

void xielu(float squares, float exponentials, float all, int64_t n, float* x) {
    const F square = splat(squares), scale = splat(all), exponential = splat(exponentials + all);
    for (int64_t i = 0; i < n; i += kLanes) {
        const F v = load_part(x + i, n - i), above = max(v, zero()), below = sub(v, above);
        const F curve = fma(mul(square, above), above, mul(exponential, sub(exponential_less_one(below), below)));
        store_part(x + i, fma(scale, v, curve), n - i);
    }
}

// The index of the first largest value; -1 if a value is not a number.
int64_t argmax(const float* x, int64_t n) {
    F most = splat(-INFINITY);
    uint32_t numbers = 0xffff;
    for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
        F v = load(x + i);
        numbers &= at_least(v, v);
        most = max(v, most);
    }
    float peak = highest(most);
    for (int64_t i = n / kLanes * kLanes; i < n; i++) {
        if (std::isnan(x[i])) return -1;
        peak = x[i] > peak ? x[i] : peak;
    }
    if (numbers != 0xffff) return -1;
    for (int64_t i = 0; i < n; i++)
        if (x[i] == peak) return i;
    return 0;
}

void axpy(float* out, const float* x, float factor, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes)
        store_part(out + i, fma(load_part(x + i, n - i), splat(factor), load_part(out + i, n - i)), n - i);
}

}  // namespace
}  // namespace inflight
