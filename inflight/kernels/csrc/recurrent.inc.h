// Recurrent layers, token by token: a chunk of a prompt does what as many decoding steps do, in the same order, so that
// no cut of a prompt changes a bit. A column of a head's memory never meets another column.
namespace inflight {
namespace {

constexpr int kDeltaLines = kDirectRows >= 12 ? 2 : 1;  // lines of columns that are computed together

INLINE F sigmoid(F x) { return div(splat(1.0f), add(splat(1.0f), exponential(bounded(sub(zero(), x))))); }

// A causal convolution of 16 channels over `tokens` tokens, then SiLU, in place. `past` are the channels' last K - 1
// inputs, oldest first, `past_stride` apart. Tokens are taken from the last to the first, because their inputs are
// overwritten; each output sums from the oldest input to the newest.
template <int K>
void convolve_line(float* x, int64_t stride, int64_t tokens, const float* weights, int64_t weight_stride, float* past,
                   int64_t past_stride, int64_t left) {
    F before[K - 1], w[K], window[K];
    for (int i = 0; i < K; i++) w[i] = load_part(weights + i * weight_stride, left);
    for (int i = 0; i < K - 1; i++) before[i] = load_part(past + i * past_stride, left);
    auto input = [&](int64_t t) { return t >= 0 ? load_part(x + t * stride, left) : before[K - 1 + t]; };
    for (int i = 0; i < K - 1; i++) store_part(past + i * past_stride, input(tokens - (K - 1) + i), left);
    for (int i = 0; i < K; i++) window[i] = input(tokens - 1 - i);
    for (int64_t t = tokens - 1; t >= 0; t--) {
        F sum = mul(w[0], window[K - 1]);
        for (int i = K - 2; i >= 0; i--) sum = fma(w[K - 1 - i], window[i], sum);
        store_part(x + t * stride, activated<Activation::kSilu>(sum), left);
        for (int i = 0; i < K - 1; i++) window[i] = window[i + 1];
        if (t > 0) window[K - 1] = input(t - K);
    }
}

void convolve(int64_t taps, float* x, int64_t stride, int64_t tokens, const float* weights, int64_t weight_stride,
              float* past, int64_t past_stride, int64_t channels) {
    auto line = taps == 2   ? convolve_line<2>
                : taps == 3 ? convolve_line<3>
                : taps == 4 ? convolve_line<4>
                : taps == 5 ? convolve_line<5>
                : taps == 6 ? convolve_line<6>
                : taps == 7 ? convolve_line<7>
                            : convolve_line<8>;
    for (int64_t i = 0; i < channels; i += kLanes)
        line(x + i, stride, tokens, weights + i, weight_stride, past + i, past_stride, channels - i);
}

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

// The gated delta rule over Lines lines of a head's columns: u = share * (v - decay * Sᵀk), S = decay * S + k uᵀ,
// out = Sᵀq. Each sum over the key axis has four accumulators, joined in one order.
template <int Lines>
void delta_columns(const DeltaRow& row, const float* q, const float* k, const float* v, float* out,
                   const DeltaStep* steps, int64_t dim, int64_t columns, float* memory) {
    const int64_t whole = dim / 4 * 4;
    for (int64_t t = 0; t < row.tokens; t++, q += row.stride, k += row.stride, v += row.stride, out += row.out_stride) {
        F sums[Lines][4], u[Lines];
        const F decay = splat(steps[t].decay), share = splat(steps[t].share);
        for (int l = 0; l < Lines; l++)
            for (int j = 0; j < 4; j++) sums[l][j] = zero();
        auto read = [&](int64_t i, int j) {
            const F key = splat(k[i]);
            for (int l = 0; l < Lines; l++) sums[l][j] = fma(load(memory + (l * dim + i) * kLanes), key, sums[l][j]);
        };
        for (int64_t i = 0; i < whole; i += 4)
            for (int j = 0; j < 4; j++) read(i + j, j);
        for (int j = 0; j < 3; j++)  // no index of a sum may be unknown when this is compiled: they are registers
            if (whole + j < dim) read(whole + j, j);
        for (int l = 0; l < Lines; l++) {
            const F held = add(add(sums[l][0], sums[l][1]), add(sums[l][2], sums[l][3]));
            u[l] = mul(sub(load_part(v + l * kLanes, columns - l * kLanes), mul(decay, held)), share);
            for (int j = 0; j < 4; j++) sums[l][j] = zero();
        }
        auto write = [&](int64_t i, int j) {
            const F key = splat(k[i]), query = splat(q[i]);
            for (int l = 0; l < Lines; l++) {
                float* at = memory + (l * dim + i) * kLanes;
                const F value = fma(key, u[l], mul(load(at), decay));
                store(at, value);
                sums[l][j] = fma(value, query, sums[l][j]);
            }
        };
        for (int64_t i = 0; i < whole; i += 4)
            for (int j = 0; j < 4; j++) write(i + j, j);
        for (int j = 0; j < 3; j++)
            if (whole + j < dim) write(whole + j, j);
        for (int l = 0; l < Lines; l++)
            store_part(out + l * kLanes, add(add(sums[l][0], sums[l][1]), add(sums[l][2], sums[l][3])),
                       columns - l * kLanes);
    }
}

// RMSNorm(out) * w * SiLU(z) of one head.
void gated_norm(const Delta& d, const float* z, float* out) {
    const F factor = splat(norm_factor(out, d.value_dim, d.eps));
    for (int64_t i = 0; i < d.value_dim; i += kLanes) {
        const int64_t left = d.value_dim - i;
        const F y = mul(mul(load_part(out + i, left), factor), load_part(d.norm + i, left));
        store_part(out + i, mul(y, activated<Activation::kSilu>(load_part(z + i, left))), left);
    }
}

void delta_head(const Delta& d, const DeltaRow& row, int64_t head, const float* q, const float* k, float* memory,
                DeltaStep* steps) {
    const int64_t values = d.value_heads * d.value_dim;
    const float* z = row.x + d.channels() + head * d.value_dim;
    const float* rates = row.x + d.channels() + values;  // β's logits of all heads, then the decays' logits
    for (int64_t t = 0; t < row.tokens; t++) {
        const float b = rates[t * row.stride + head],
                    a = rates[t * row.stride + d.value_heads + head] + d.dt_bias[head];
        const float softplus = a > 20.0f ? a : log1pf(expf(a));
        steps[t] = {expf(d.decay[head] * softplus), 1.0f / (1.0f + expf(-b))};
    }
    const float* v = row.x + 2 * d.key_heads * d.key_dim + head * d.value_dim;
    float* out = row.out + head * d.value_dim;
    for (int64_t i = 0, lines; i < d.value_dim; i += lines * kLanes) {
        lines = d.value_dim - i > kLanes ? kDeltaLines : 1;
        auto run = lines == kDeltaLines ? delta_columns<kDeltaLines> : delta_columns<1>;
        run(row, q, k, v + i, out + i, steps, d.key_dim, d.value_dim - i, memory + i * d.key_dim);
    }
    for (int64_t t = 0; t < row.tokens; t++) gated_norm(d, z + t * row.stride, out + t * row.out_stride);
}

// All that one key head and its value heads do with a row's tokens.
void delta(const Delta& d, const DeltaRow& row, int64_t key_head, float* state, float* scratch) {
    const int64_t keys = d.key_heads * d.key_dim, own = d.own_channels();
    float *q = row.x + key_head * d.key_dim, *k = q + keys;
    auto run = [&](float* x, int64_t at, int64_t channels) {
        convolve(d.taps, x, row.stride, row.tokens, d.conv + (x - row.x), d.channels(), state + at, own, channels);
    };
    run(q, 0, d.key_dim);
    run(k, d.key_dim, d.key_dim);
    for (int64_t i = 0; i < d.shared(); i++)
        run(row.x + 2 * keys + d.value_head(key_head, i) * d.value_dim, 2 * d.key_dim + i * d.value_dim, d.value_dim);
    for (int64_t t = 0; t < row.tokens; t++) {
        unit_length(q + t * row.stride, d.key_dim, 1.0f / sqrtf(static_cast<float>(d.key_dim)));
        unit_length(k + t * row.stride, d.key_dim, 1.0f);
    }
    for (int64_t i = 0; i < d.shared(); i++)
        delta_head(d, row, d.value_head(key_head, i), q, k, state + d.conv_floats() + i * d.memory_floats(),
                   reinterpret_cast<DeltaStep*>(scratch));
}

// out *= σ(x); `broadcast`: by one number.
void output_gate(const float* x, bool broadcast, int64_t n, float* out) {
    const F all = broadcast ? sigmoid(splat(*x)) : zero();
    for (int64_t i = 0; i < n; i += kLanes)
        store_part(out + i, mul(load_part(out + i, n - i), broadcast ? all : sigmoid(load_part(x + i, n - i))), n - i);
}

}  // namespace
}  // namespace inflight
