// Recurrent layers, token by token: a chunk of a prompt does what as many decoding steps do, in the same order, so that
// no cut of a prompt changes a bit. A column of a head's memory never meets another column.
namespace inflight {
namespace {

constexpr int kDeltaLines = kDirectRows >= 12 ? 2 : 1;  // lines of columns that are computed together
constexpr bool kDeltaAhead = kDirectRows >= 12;         // registers suffice for two tokens' sums

INLINE F sigmoid(F x) { return div(splat(1.0f), add(splat(1.0f), exponential(bounded(sub(zero(), x))))); }

// A causal convolution of some channels over `tokens` tokens. `past` are the channels' last inputs, oldest first; each
// output sums from the oldest input to the newest.
struct Convolved {
    int64_t tokens, taps;
    const float* x;  // [tokens][stride]
    int64_t stride;
    float* out;  // [tokens][out_stride]; may be `x`
    int64_t out_stride;
    const float* weights;  // [taps][weight_stride]
    int64_t weight_stride;
    const float* bias;  // or null
    float* past;        // [taps - 1][past_stride]
    int64_t past_stride;
    const float *before = nullptr, *after = nullptr;  // like `x`: factors of inputs and of results, in place of SiLU
};

template <int K, bool Gated>
void convolve_line(const Convolved& c, int64_t i, int64_t left) {
    F w[K], window[K];
    EACH_ROW for (int j = 0; j < K; j++) w[j] = load_part(c.weights + j * c.weight_stride + i, left);
    EACH_ROW for (int j = 0; j < K - 1; j++) window[j] = load_part(c.past + j * c.past_stride + i, left);
    const F start = c.bias ? load_part(c.bias + i, left) : zero();
    for (int64_t t = 0; t < c.tokens; t++) {
        F x = load_part(c.x + t * c.stride + i, left);
        if (Gated) x = mul(load_part(c.before + t * c.stride + i, left), x);
        window[K - 1] = x;
        F sum = start;
        EACH_ROW for (int j = 0; j < K; j++) sum = fma(w[j], window[j], sum);
        sum = Gated ? mul(load_part(c.after + t * c.stride + i, left), sum) : activated<Activation::kSilu>(sum);
        store_part(c.out + t * c.out_stride + i, sum, left);
        EACH_ROW for (int j = 0; j < K - 1; j++) window[j] = window[j + 1];
    }
    EACH_ROW for (int j = 0; j < K - 1; j++) store_part(c.past + j * c.past_stride + i, window[j], left);
}

template <bool Gated>
void convolve(const Convolved& c, int64_t channels) {
    auto line = c.taps == 2   ? convolve_line<2, Gated>
                : c.taps == 3 ? convolve_line<3, Gated>
                : c.taps == 4 ? convolve_line<4, Gated>
                : c.taps == 5 ? convolve_line<5, Gated>
                : c.taps == 6 ? convolve_line<6, Gated>
                : c.taps == 7 ? convolve_line<7, Gated>
                              : convolve_line<8, Gated>;
    for (int64_t i = 0; i < channels; i += kLanes) line(c, i, channels - i);
}

int64_t conv_channels(int64_t channels, int64_t unit) {
    const int64_t left = channels - unit * kConvChannels;
    return left < kConvChannels ? left : kConvChannels;
}

void short_conv(const ShortConv& s, const RowTokens& row, int64_t unit, float* state) {
    const int64_t first = unit * kConvChannels;
    Convolved c{
        row.tokens,     s.taps,     row.x + 2 * s.channels + first,    row.stride, row.out + first, row.out_stride,
        s.conv + first, s.channels, s.bias ? s.bias + first : nullptr, state,      kConvChannels};
    c.before = row.x + first;
    c.after = row.x + s.channels + first;
    convolve<true>(c, conv_channels(s.channels, unit));
}

// softplus as torch has it.
float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// x / sqrt(sum of squares + 1e-6) * scale, in place.
void unit_length(float* x, int64_t n, float scale) {
    F squares = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        F v = load_part(x + i, n - i);
        squares = fma(v, v, squares);
    }
    const F factor = splat(1.0f / sqrtf(sum(squares) + 1e-6f));
    for (int64_t i = 0; i < n; i += kLanes)
        store_part(x + i, mul(mul(load_part(x + i, n - i), factor), splat(scale)), n - i);
}

// What each token does to a value head's memory: it decays by e ** g and takes up a share of the new value.
struct DeltaStep {
    float decay, share;
};

// A piece of a row's tokens for one value head, side by side in scratch: pointers are to the first token's.
struct DeltaPiece {
    int64_t tokens, stride;  // floats from token to token
    const float *q, *k, *v;
    float* out;  // [tokens][value_dim]
    int64_t out_stride;
    const DeltaStep* steps;
    int64_t dim;  // of keys
};

// Sums over the key axis have four accumulators, joined in one order. No index of one may be unknown when this is
// compiled: they are registers.
struct DeltaSums {
    F of[4] = {zero(), zero(), zero(), zero()};
    F total() const { return add(add(of[0], of[1]), add(of[2], of[3])); }
};

// Calls work(i, i % 4) for the key axis; the second argument is known when this is compiled.
template <class Work>
INLINE void along_keys(int64_t dim, Work work) {
    const int64_t whole = dim / 4 * 4;
    for (int64_t i = 0; i < whole; i += 4) EACH_ROW for (int j = 0; j < 4; j++) work(i + j, j);
    EACH_ROW for (int j = 0; j < 3; j++) if (whole + j < dim) work(whole + j, j);
}

// The gated delta rule over Lines lines of a head's columns: u = share * (v - decay * Sᵀk), S = decay * S + k uᵀ,
// out = Sᵀq. Where registers suffice, Sᵀk of the next token is summed on the way.
template <int Lines>
void delta_columns(const DeltaPiece& p, int64_t at, int64_t columns, float* memory) {
    const int64_t dim = p.dim;
    DeltaSums held[Lines];
    auto read = [&](const float* k) __attribute__((always_inline)) {
        for (int l = 0; l < Lines; l++) held[l] = DeltaSums();
        along_keys(dim, [&](int64_t i, int j) __attribute__((always_inline)) {
            const F key = splat(k[i]);
            for (int l = 0; l < Lines; l++)
                held[l].of[j] = fma(load(memory + (l * dim + i) * kLanes), key, held[l].of[j]);
        });
    };
    read(p.k);
    for (int64_t t = 0; t < p.tokens; t++) {
        const float *q = p.q + t * p.stride, *k = p.k + t * p.stride, *v = p.v + t * p.stride + at;
        const F decay = splat(p.steps[t].decay), share = splat(p.steps[t].share);
        F u[Lines];
        DeltaSums sums[Lines];
        EACH_ROW for (int l = 0; l < Lines; l++) {
            const F value = load_part(v + l * kLanes, columns - l * kLanes);
            u[l] = mul(sub(value, mul(decay, held[l].total())), share);
        }
        auto write = [&](int64_t i, int j, const float* ahead) __attribute__((always_inline)) {
            const F key = splat(k[i]), query = splat(q[i]);
            for (int l = 0; l < Lines; l++) {
                float* to = memory + (l * dim + i) * kLanes;
                const F value = fma(key, u[l], mul(load(to), decay));
                store(to, value);
                sums[l].of[j] = fma(value, query, sums[l].of[j]);
                if (ahead) held[l].of[j] = fma(value, splat(ahead[i]), held[l].of[j]);
            }
        };
        if (kDeltaAhead && t + 1 < p.tokens) {
            for (int l = 0; l < Lines; l++) held[l] = DeltaSums();
            const float* ahead = k + p.stride;
            along_keys(dim, [&](int64_t i, int j) __attribute__((always_inline)) { write(i, j, ahead); });
        } else {
            along_keys(dim, [&](int64_t i, int j) __attribute__((always_inline)) { write(i, j, nullptr); });
            if (t + 1 < p.tokens) read(k + p.stride);
        }
        for (int l = 0; l < Lines; l++)
            store_part(p.out + t * p.out_stride + at + l * kLanes, sums[l].total(), columns - l * kLanes);
    }
}

// RMSNorm(x) * w * SiLU(z) of one head.
void gated_norm(const Delta& d, const float* z, const float* x, float* out) {
    const F factor = splat(norm_factor(x, d.value_dim, d.eps));
    for (int64_t i = 0; i < d.value_dim; i += kLanes) {
        const int64_t left = d.value_dim - i;
        const F y = mul(mul(load_part(x + i, left), factor), load_part(d.norm + i, left));
        store_part(out + i, mul(y, activated<Activation::kSilu>(load_part(z + i, left))), left);
    }
}

void delta_head(const Delta& d, const RowTokens& row, int64_t head, DeltaPiece p, float* memory, DeltaStep* steps) {
    const int64_t values = d.value_heads * d.value_dim;
    const float* z = row.x + d.channels() + head * d.value_dim;
    const float* rates = row.x + d.channels() + values;  // β's logits of all heads, then the decays' logits
    for (int64_t t = 0; t < row.tokens; t++) {
        const float b = rates[t * row.stride + head],
                    a = rates[t * row.stride + d.value_heads + head] + d.dt_bias[head];
        steps[t] = {expf(d.decay[head] * softplus(a)), 1.0f / (1.0f + expf(-b))};
    }
    p.steps = steps;
    for (int64_t i = 0, lines; i < d.value_dim; i += lines * kLanes) {
        lines = d.value_dim - i > kLanes ? kDeltaLines : 1;
        auto run = lines == kDeltaLines ? delta_columns<kDeltaLines> : delta_columns<1>;
        run(p, i, d.value_dim - i, memory + i * d.key_dim);
    }
    for (int64_t t = 0; t < row.tokens; t++)
        gated_norm(d, z + t * row.stride, p.out + t * p.out_stride, row.out + t * row.out_stride + head * d.value_dim);
}

// A piece of a row's tokens. What the heads read of a row lies far from the next row's: it is brought together first.
void delta_piece(const Delta& d, const RowTokens& row, int64_t key_head, float* state, float* scratch) {
    const int64_t keys = d.key_heads * d.key_dim, own = d.own_channels();
    auto run = [&](int64_t from, int64_t to, int64_t channels) {
        convolve<false>({row.tokens, d.taps, row.x + from, row.stride, scratch + to, own, d.conv + from, d.channels(),
                         nullptr, state + to, own},
                        channels);
    };
    run(key_head * d.key_dim, 0, d.key_dim);
    run(keys + key_head * d.key_dim, d.key_dim, d.key_dim);
    for (int64_t i = 0; i < d.shared(); i++)
        run(2 * keys + d.value_head(key_head, i) * d.value_dim, 2 * d.key_dim + i * d.value_dim, d.value_dim);
    for (int64_t t = 0; t < row.tokens; t++) {
        unit_length(scratch + t * own, d.key_dim, 1.0f / sqrtf(static_cast<float>(d.key_dim)));
        unit_length(scratch + t * own + d.key_dim, d.key_dim, 1.0f);
    }
    float* out = scratch + kDeltaTokens * own;
    DeltaPiece p{row.tokens, own, scratch, scratch + d.key_dim, nullptr, out, d.value_dim, nullptr, d.key_dim};
    for (int64_t i = 0; i < d.shared(); i++) {
        p.v = scratch + 2 * d.key_dim + i * d.value_dim;
        delta_head(d, row, d.value_head(key_head, i), p, state + d.conv_floats() + i * d.memory_floats(),
                   reinterpret_cast<DeltaStep*>(out + kDeltaTokens * d.value_dim));
    }
}

// What a key head's part of some rows is read ahead of its use.
void fetch_delta(const Delta& d, const RowTokens& row, int64_t key_head) {
    const int64_t keys = d.key_heads * d.key_dim;
    auto fetch = [](const float* at, int64_t n) {
        for (int64_t i = 0; i < n; i += kLanes) __builtin_prefetch(at + i, 0, 2);
    };
    for (int64_t t = 0; t < row.tokens; t++) {
        const float* x = row.x + t * row.stride;
        fetch(x + key_head * d.key_dim, d.key_dim);
        fetch(x + keys + key_head * d.key_dim, d.key_dim);
        for (int64_t i = 0; i < d.shared(); i++) {
            const int64_t at = d.value_head(key_head, i) * d.value_dim;
            fetch(x + 2 * keys + at, d.value_dim);
            fetch(x + d.channels() + at, d.value_dim);
        }
    }
}

// All that one key head and its value heads do with a row's tokens.
void delta(const Delta& d, const RowTokens& row, int64_t key_head, float* state, float* scratch) {
    for (int64_t first = 0; first < row.tokens; first += kDeltaTokens) {
        auto piece = [&](int64_t begin) {
            const int64_t left = row.tokens - begin;
            return RowTokens{left < kDeltaTokens ? left : kDeltaTokens, row.x + begin * row.stride, row.stride,
                             row.out + begin * row.out_stride, row.out_stride};
        };
        if (first + kDeltaTokens < row.tokens) fetch_delta(d, piece(first + kDeltaTokens), key_head);
        delta_piece(d, piece(first), key_head, state, scratch);
    }
}

// out *= σ(x); `broadcast`: by one number.
void output_gate(const float* x, bool broadcast, int64_t n, float* out) {
    const F all = broadcast ? sigmoid(splat(*x)) : zero();
    for (int64_t i = 0; i < n; i += kLanes)
        store_part(out + i, mul(load_part(out + i, n - i), broadcast ? all : sigmoid(load_part(x + i, n - i))), n - i);
}

}  // namespace
}  // namespace inflight
