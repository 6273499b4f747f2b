// y = x Wᵀ over packed panels. For any number of rows a lane of `sums` adds the inputs in their order, so a row's
// result does not depend on the rows beside it. EACH_ROW unrolls loops over arrays of lanes: only then the compiler
// keeps them in registers.
#define EACH_ROW _Pragma("GCC unroll 12")

namespace inflight {
namespace {

// The prefetch distance in the stream of weights, in bytes. With few rows out-of-order execution runs ahead by itself;
// with more arithmetic between the loads it does not.
constexpr int64_t kFewRows = 4, kAheadOfFew = 3072, kAheadOfMany = 8192;

// Prefetches into the second-level cache while a tile runs: for each 128 bytes that it reads, `pace` bytes from `at`
// on.
struct Fetch {
    const char* at;
    int64_t pace;
};

INLINE void next(Fetch& fetch) {
    __builtin_prefetch(fetch.at, 0, 2);
    __builtin_prefetch(fetch.at + 64, 0, 2);
    fetch.at += fetch.pace;
}

// The first row tile prefetches the panel itself. The others find it in the cache, and each prefetches a share of the
// next panel, so that memory is not idle while they compute.
INLINE Fetch fetch_of(const Weights& w, int64_t panel, int64_t tile, int64_t tiles, int64_t rows) {
    const char* begin = w.data + panel * w.panel_bytes;
    if (!tile) return {begin + (rows <= kFewRows ? kAheadOfFew : kAheadOfMany), 128};
    return {begin + w.panel_bytes + (tile - 1) * w.panel_bytes / (tiles - 1), 128 / (tiles - 1)};
}

// Writes 16 columns of a tile's rows as the next product reads them, see Input; `columns` is even.
template <int M>
INLINE void put(const F (&values)[M], char* tile, int64_t column, int64_t columns) {
    int64_t pairs = columns - column < kLanes ? (columns - column) / 2 : kLanes / 2;
    char* at = tile + column / 2 * M * 4;
    alignas(64) char bits[4][64];
    EACH_ROW for (int m = 0; m < M; m++) {
        to_bf16(values[m], reinterpret_cast<uint16_t*>(bits[m % 4]));
        spread_row<M>(bits, m, pairs, at);
    }
}

// Adds a panel's bias to sums.
struct Biased {
    bool any;
    F of[2];

    Biased(const Weights& w, int64_t panel) : any(w.bias), of{zero(), zero()} {
        if (any)
            for (int j = 0; j < 2; j++) of[j] = load(w.bias + panel * kPanel + j * kLanes);
    }
    F operator()(F sum, int j) const { return any ? add(sum, of[j]) : sum; }
};

template <int M>
INLINE void finish(const Weights& w, const F (&sums)[M][2], int64_t panel, int64_t row, const Target& t) {
    const Biased biased(w, panel);
    auto value = [&](int m, int j) { return biased(sums[m][j], j); };
    if (t.mode == Mode::kGate) {
        int64_t columns = w.n / 2, column = panel * kLanes;
        F results[M];
        EACH_ROW for (int m = 0; m < M; m++) results[m] = gated(t.act, value(m, 0), value(m, 1));
        if (t.tiles) return put<M>(results, t.tiles + row * columns * 2, column, columns);
        EACH_ROW for (int m = 0; m < M; m++)
            store_part(t.out + (row + m) * t.stride + column, results[m], columns - column);
        return;
    }
    if (t.mode == Mode::kActivate) {
        for (int j = 0; j < 2; j++) {
            const int64_t column = panel * kPanel + j * kLanes, left = w.n - column;
            if (left <= 0) break;
            F values[M];
            EACH_ROW for (int m = 0; m < M; m++) values[m] = value(m, j);
            for (int m = 0; m < M; m++) values[m] = activated(t.act, values[m]);
            if (t.tiles)
                put<M>(values, t.tiles + row * w.n * 2, column, w.n);
            else
                for (int m = 0; m < M; m++) store_part(t.out + (row + m) * t.stride + column, values[m], left);
        }
        return;
    }
    EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < 2; j++) {
        int64_t column = panel * kPanel + j * kLanes, left = w.n - column;
        if (left <= 0) break;
        float* out = t.out + (row + m) * t.stride + column;
        F y = value(m, j);
        store_part(out, t.mode == Mode::kAdd ? fma(y, splat(t.scale), load_part(out, left)) : y, left);
    }
}

template <int M>
void tile_float(const Weights& w, Fetch fetch, const char* panel, const char* x, F (&sums)[M][2]) {
    const float* a = reinterpret_cast<const float*>(x);
    for (int64_t k = 0; k < w.depth; k++, panel += 128, a += M) {
        next(fetch);
        F line[2] = {load(reinterpret_cast<const float*>(panel)), load(reinterpret_cast<const float*>(panel) + kLanes)};
        EACH_ROW for (int m = 0; m < M; m++) {
            F one = splat(a[m]);
            sums[m][0] = fma(one, line[0], sums[m][0]);
            sums[m][1] = fma(one, line[1], sums[m][1]);
        }
    }
}

template <int M>
void tile_bf16(const Weights& w, Fetch fetch, const char* panel, const char* x, F (&sums)[M][2]) {
    for (int64_t k = 0; k < w.depth; k += 2, panel += 128, x += 4 * M) {
        next(fetch);
        Line2 first = line2(panel), second = line2(panel + 64);
        EACH_ROW for (int m = 0; m < M; m++) {
            Pair two = pair(x + 4 * m);
            sums[m][0] = dot2(sums[m][0], first, two);
            sums[m][1] = dot2(sums[m][1], second, two);
        }
    }
}

template <int M>
void tile_int8(const Weights& w, Fetch fetch, const char* panel, const char* x, const float* scales,
               const int32_t* starts, const float* lane_scales, F (&sums)[M][2]) {
    I whole_sums[M][2];
    EACH_ROW for (int m = 0; m < M; m++) whole_sums[m][0] = whole_sums[m][1] = whole(starts[m]);
    for (int64_t k = 0; k < w.depth; k += 4, panel += 128, x += 4 * M) {
        next(fetch);
        Line first = line(panel), second = line(panel + 64);
        EACH_ROW for (int m = 0; m < M; m++) {
            Quad four = quad(x + 4 * m);
            whole_sums[m][0] = dot4(whole_sums[m][0], first, four);
            whole_sums[m][1] = dot4(whole_sums[m][1], second, four);
        }
    }
    EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < 2; j++) sums[m][j] =
        mul(to_float(whole_sums[m][j]), mul(splat(scales[m]), load(lane_scales + j * kLanes)));
}

template <int M, bool Four, bool Offsets>
void tile_grouped(const Weights& w, Fetch fetch, const char* panel, const char* x, const float* scales,
                  const int32_t* starts, F (&sums)[M][2]) {
    for (int64_t k = 0; k < w.depth; k += w.group, starts += M) {
        F scale[2] = {float16(panel), float16(panel + 32)};
        F offset[2];
        if (Offsets) offset[0] = float16(panel + 64), offset[1] = float16(panel + 96);
        panel += Offsets ? 128 : 64;
        I group_sums[M][2];
        EACH_ROW for (int m = 0; m < M; m++) group_sums[m][0] = group_sums[m][1] = whole(Offsets ? 0 : starts[m]);
        for (int64_t i = 0; i < w.group; i += Four ? 8 : 4, panel += 128, x += (Four ? 8 : 4) * M) {
            next(fetch);
            if (Four) {
                Line low[2], high[2];
                halves(panel, low[0], high[0]);
                halves(panel + 64, low[1], high[1]);
                EACH_ROW for (int m = 0; m < M; m++) {
                    Quad four = quad(x + 4 * m);
                    group_sums[m][0] = dot4(group_sums[m][0], low[0], four);
                    group_sums[m][1] = dot4(group_sums[m][1], low[1], four);
                }
                EACH_ROW for (int m = 0; m < M; m++) {
                    Quad four = quad(x + 4 * (M + m));
                    group_sums[m][0] = dot4(group_sums[m][0], high[0], four);
                    group_sums[m][1] = dot4(group_sums[m][1], high[1], four);
                }
            } else {
                Line first = line(panel), second = line(panel + 64);
                EACH_ROW for (int m = 0; m < M; m++) {
                    Quad four = quad(x + 4 * m);
                    group_sums[m][0] = dot4(group_sums[m][0], first, four);
                    group_sums[m][1] = dot4(group_sums[m][1], second, four);
                }
            }
        }
        EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < 2; j++) {
            sums[m][j] = fma(to_float(group_sums[m][j]), scale[j], sums[m][j]);
            if (Offsets) sums[m][j] = fma(offset[j], splat(-static_cast<float>(starts[m])), sums[m][j]);
        }
    }
    EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < 2; j++) sums[m][j] = mul(sums[m][j], splat(scales[m]));
}

template <int M, Format T, bool Offsets>
void tile(const Weights& w, Fetch fetch, const Input& in, int64_t panel, int64_t row, const Target& target) {
    F sums[M][2];
    EACH_ROW for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = zero();
    const char* weights = w.data + panel * w.panel_bytes;
    const char* x = in.data + row * w.depth * input_bytes(T);
    if (target.mode == Mode::kAdd)  // the output is read too; it may lie in memory
        for (int m = 0; m < M; m++) {
            const float* out = target.out + (row + m) * target.stride + panel * kPanel;
            __builtin_prefetch(out, 1, 2);
            __builtin_prefetch(out + kLanes, 1, 2);
        }
    if (T == Format::kFloat) tile_float<M>(w, fetch, weights, x, sums);
    if (T == Format::kBf16) tile_bf16<M>(w, fetch, weights, x, sums);
    if (T == Format::kInt8)
        tile_int8<M>(w, fetch, weights, x, in.scales + row, in.sums + row, w.scales + panel * kPanel, sums);
    if (T == Format::kGroup8)
        tile_grouped<M, false, Offsets>(w, fetch, weights, x, in.scales + row, in.sums + row * w.groups(), sums);
    if (T == Format::kGroup4)
        tile_grouped<M, true, Offsets>(w, fetch, weights, x, in.scales + row, in.sums + row * w.groups(), sums);
    finish<M>(w, sums, panel, row, target);
}

// One function for each number of rows, by recursion from the largest tile down.
template <int M, Format T, bool Offsets>
struct Tiles {
    static void run(int64_t rows, const Weights& w, Fetch fetch, const Input& in, int64_t panel, int64_t row,
                    const Target& target) {
        if (rows == M) return tile<M, T, Offsets>(w, fetch, in, panel, row, target);
        Tiles<M - 1, T, Offsets>::run(rows, w, fetch, in, panel, row, target);
    }
};
template <Format T, bool Offsets>
struct Tiles<0, T, Offsets> {
    static void run(int64_t, const Weights&, Fetch, const Input&, int64_t, int64_t, const Target&) {}
};

template <Format T, bool Offsets, int Most>
void product_as(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile,
                const Target& target) {
    for (int64_t panel = first; panel < last;
         panel++)  // a panel stays in the second-level cache while all rows pass by
        for (int64_t t = first_tile; t < last_tile; t++) {
            int64_t row = in.start(t), rows = in.start(t + 1) - row;
            Fetch fetch = fetch_of(w, panel, t - first_tile, last_tile - first_tile, rows);
            Tiles<Most, T, Offsets>::run(rows, w, fetch, in, panel, row, target);
        }
}

}  // namespace
}  // namespace inflight
