// Products with the factors of adapters, see lora.h. Every sum has its own lanes and takes its inputs in their order,
// so that it is the same in every tile.
namespace inflight {
namespace {

constexpr int kLowTile = kDirectRows > 8 ? 4 : 2;  // tokens, and rows of a first factor, whose sums are in registers

INLINE F factor(const float* p) { return load(p); }
INLINE F factor(const uint16_t* p) { return from_bf16(p); }

// Sums of M tokens with R rows.
template <int M, int R, class T>
INLINE void dots(const T* rows, int64_t depth, const float* const* x, float* const* out, int64_t row) {
    F sums[M][R];
    EACH_ROW for (int m = 0; m < M; m++) EACH_ROW for (int r = 0; r < R; r++) sums[m][r] = zero();
    for (int64_t i = 0; i < depth; i += kLanes) {
        F lines[R];
        EACH_ROW for (int r = 0; r < R; r++) lines[r] = factor(rows + (row + r) * depth + i);
        EACH_ROW for (int m = 0; m < M; m++) {
            F inputs = load(x[m] + i);
            EACH_ROW for (int r = 0; r < R; r++) sums[m][r] = fma(inputs, lines[r], sums[m][r]);
        }
    }
    EACH_ROW for (int m = 0; m < M; m++) EACH_ROW for (int r = 0; r < R; r++) out[m][row + r] = sum(sums[m][r]);
}

template <int M, class T>
void dots_of(const LowFirst& factors, const float* const* x, int64_t first, int64_t last, float* const* out) {
    const T* rows = reinterpret_cast<const T*>(factors.data);
    int64_t row = first;
    for (; row + kLowTile <= last; row += kLowTile) dots<M, kLowTile>(rows, factors.depth, x, out, row);
    for (; row < last; row++) dots<M, 1>(rows, factors.depth, x, out, row);
}

// One panel of outputs for M tokens, added to what they have.
template <int M, class T>
INLINE void widen(const LowSecond& factors, int64_t panel, const float* const* hidden, float* const* out) {
    const T* data = reinterpret_cast<const T*>(factors.data) + panel * factors.rank * kLowPanel;
    for (int64_t begin = 0; begin < kLowPanel; begin += kLowTile * kLanes) {
        const int64_t column = panel * kLowPanel + begin;
        if (column >= factors.n) break;
        F sums[M][kLowTile];
        EACH_ROW for (int m = 0; m < M; m++) EACH_ROW for (int j = 0; j < kLowTile; j++) sums[m][j] = zero();
        for (int64_t i = 0; i < factors.rank; i++) {
            F lines[kLowTile];
            EACH_ROW for (int j = 0; j < kLowTile; j++) lines[j] = factor(data + i * kLowPanel + begin + j * kLanes);
            EACH_ROW for (int m = 0; m < M; m++) {
                F input = splat(hidden[m][factors.hidden + i]);
                EACH_ROW for (int j = 0; j < kLowTile; j++) sums[m][j] = fma(input, lines[j], sums[m][j]);
            }
        }
        EACH_ROW for (int m = 0; m < M; m++) EACH_ROW for (int j = 0; j < kLowTile; j++) {
            const int64_t output = column + j * kLanes, left = factors.n - output;
            if (left <= 0) continue;
            float* to = out[m] + (factors.half < 0 ? factors.column + output : 2 * output + factors.half * kLanes);
            store_part(to, fma(sums[m][j], splat(factors.scale), load_part(to, left)), left);
        }
    }
}

template <int M, class T>
void widen_all(const LowSecond& factors, int64_t first, int64_t last, const float* const* hidden, float* const* out) {
    for (int64_t panel = first; panel < last; panel++) widen<M, T>(factors, panel, hidden, out);
}

// Calls work<M>(first token) for tokens in tiles of at most kLowTile.
template <template <int> class Work, class... Arguments>
INLINE void in_low_tiles(int64_t tokens, Arguments... arguments) {
    for (int64_t at = 0; at < tokens; at += kLowTile) {
        const int64_t left = tokens - at;
        if (left == 1) return Work<1>::run(at, arguments...);
        if (kLowTile == 2 || left == 2)
            Work<2>::run(at, arguments...);
        else if (left == 3)
            Work<3>::run(at, arguments...);
        else
            Work<4>::run(at, arguments...);
    }
}

template <int M>
struct Shrink {
    static void run(int64_t at, const LowFirst& factors, const float* const* x, int64_t first, int64_t last,
                    float* const* out) {
        if (factors.floats) return dots_of<M, float>(factors, x + at, first, last, out + at);
        dots_of<M, uint16_t>(factors, x + at, first, last, out + at);
    }
};

template <int M>
struct Expand {
    static void run(int64_t at, const LowSecond& factors, int64_t first, int64_t last, const float* const* hidden,
                    float* const* out) {
        if (factors.floats) return widen_all<M, float>(factors, first, last, hidden + at, out + at);
        widen_all<M, uint16_t>(factors, first, last, hidden + at, out + at);
    }
};

void shrink(const LowFirst& factors, const float* const* x, int64_t tokens, int64_t first, int64_t last,
            float* const* out) {
    in_low_tiles<Shrink, const LowFirst&>(tokens, factors, x, first, last, out);
}

void expand(const LowSecond& factors, const float* const* hidden, int64_t tokens, int64_t first, int64_t last,
            float* const* out) {
    in_low_tiles<Expand, const LowSecond&>(tokens, factors, first, last, hidden, out);
}

// As a gated product's end, of a row of its panels as they are.
void gate_panels(Activation act, const float* wide, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += kLanes)
        store_part(out + i, gated(act, load(wide + 2 * i), load(wide + 2 * i + kLanes)), n - i);
}

}  // namespace
}  // namespace inflight
