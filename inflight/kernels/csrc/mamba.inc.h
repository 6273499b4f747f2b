// Mamba 2, token by token: a chunk of a prompt does what as many decoding steps do, in the same order. A column of a
// head's memory never meets another column, so that several tokens may pass a line of it while it is in a register.
namespace inflight {
namespace {

constexpr int kMambaLines = kDirectRows >= 12 ? 2 : 1;   // lines of columns that are computed together
constexpr int kMambaTokens = kDirectRows >= 12 ? 4 : 1;  // tokens that pass a line together

void mamba_conv(const Mamba& m, const RowTokens& row, int64_t unit, float* state) {
    const int64_t first = unit * kConvChannels;
    float* x = row.x + m.inner() + first;
    convolve<false>({row.tokens, m.taps, x, row.stride, x, row.stride, m.conv + first, m.channels(),
                     m.conv_bias ? m.conv_bias + first : nullptr, state, kConvChannels},
                    conv_channels(m.channels(), unit));
}

// A token's step, and by what a head's memory decays in it: e ** (step * A).
struct MambaStep {
    float decay, step;
};

// Some tokens' columns of one head; pointers are to the first token's.
struct MambaColumns {
    const float *x, *b, *c;
    int64_t stride;
    float* out;
    int64_t out_stride;
    const MambaStep* steps;
    float skip;
    int64_t state;
};

// h = decay * h + (step * x) ⊗ B, out = h C + D x over Lines lines of columns. The sum over the state has two
// accumulators, for its even and odd entries.
template <int Lines, int Tokens>
void mamba_columns(const MambaColumns& m, int64_t left, float* memory) {
    F sums[Tokens][Lines][2], u[Tokens][Lines], decay[Tokens];
    EACH_ROW for (int t = 0; t < Tokens; t++) {
        decay[t] = splat(m.steps[t].decay);
        EACH_ROW for (int l = 0; l < Lines; l++) {
            u[t][l] = mul(splat(m.steps[t].step), load_part(m.x + t * m.stride + l * kLanes, left - l * kLanes));
            sums[t][l][0] = sums[t][l][1] = zero();
        }
    }
    auto update = [&](int64_t i, int j) __attribute__((always_inline)) {
        EACH_ROW for (int l = 0; l < Lines; l++) {
            float* at = memory + (l * m.state + i) * kLanes;
            F h = load(at);
            EACH_ROW for (int t = 0; t < Tokens; t++) {
                h = fma(splat(m.b[t * m.stride + i]), u[t][l], mul(h, decay[t]));
                sums[t][l][j] = fma(h, splat(m.c[t * m.stride + i]), sums[t][l][j]);
            }
            store(at, h);
        }
    };
    for (int64_t i = 0; i + 1 < m.state; i += 2) {
        update(i, 0);
        update(i + 1, 1);
    }
    if (m.state % 2) update(m.state - 1, 0);
    EACH_ROW for (int t = 0; t < Tokens; t++) EACH_ROW for (int l = 0; l < Lines; l++) {
        const F x = load_part(m.x + t * m.stride + l * kLanes, left - l * kLanes);
        store_part(m.out + t * m.out_stride + l * kLanes, fma(splat(m.skip), x, add(sums[t][l][0], sums[t][l][1])),
                   left - l * kLanes);
    }
}

template <int Tokens>
void mamba_tokens(MambaColumns m, int64_t columns, float* memory) {
    for (int64_t i = 0, lines; i < columns; i += lines * kLanes) {
        lines = columns - i > (kMambaLines - 1) * kLanes ? kMambaLines : 1;
        auto run = lines == kMambaLines ? mamba_columns<kMambaLines, Tokens> : mamba_columns<1, Tokens>;
        run(m, columns - i, memory + i * m.state);
        m.x += lines * kLanes;
        m.out += lines * kLanes;
    }
}

void mamba_head(const Mamba& m, const RowTokens& row, int64_t head, float* memory, float* scratch) {
    MambaStep* steps = reinterpret_cast<MambaStep*>(scratch);
    const float* raw = row.x + m.inner() + m.channels() + head;
    for (int64_t t = 0; t < row.tokens; t++) {
        float step = softplus(raw[t * row.stride] * m.step_scale + m.step_bias[head]);
        step = step < m.least ? m.least : step > m.most ? m.most : step;
        steps[t] = {expf(step * m.decay[head]), step};
    }
    const float* x = row.x + m.inner() + head * m.head_dim;
    const float* b = row.x + 2 * m.inner() + head / (m.heads / m.groups) * m.state;
    MambaColumns of{
        x,      b, b + m.groups * m.state, row.stride, row.out + head * m.head_dim, row.out_stride, steps, m.skip[head],
        m.state};
    for (int64_t t = 0, count; t < row.tokens; t += count) {
        count = row.tokens - t < kMambaTokens ? 1 : kMambaTokens;
        if (count == kMambaTokens)
            mamba_tokens<kMambaTokens>(of, m.head_dim, memory);
        else
            mamba_tokens<1>(of, m.head_dim, memory);
        of.x += count * row.stride;
        of.b += count * row.stride;
        of.c += count * row.stride;
        of.out += count * row.out_stride;
        of.steps += count;
    }
}

// out *= SiLU(gate_scale * z) and RMSNorm by group, in the layer's order.
void mamba_norm(const Mamba& m, const float* z, float* out) {
    const int64_t n = m.inner() / m.groups;
    const F scale = splat(m.gate_scale);
    auto gate = [&](int64_t begin) {
        for (int64_t i = 0; i < n; i += kLanes) {
            const F open = activated<Activation::kSilu>(mul(load_part(z + begin + i, n - i), scale));
            store_part(out + begin + i, mul(load_part(out + begin + i, n - i), open), n - i);
        }
    };
    for (int64_t begin = 0; begin < m.inner(); begin += n) {
        if (!m.norm_first) gate(begin);
        if (m.norm) norm_row(out + begin, n, {m.norm + begin, m.eps, false}, false, 1.0f, out + begin);
        if (m.norm_first) gate(begin);
    }
}

}  // namespace
}  // namespace inflight
