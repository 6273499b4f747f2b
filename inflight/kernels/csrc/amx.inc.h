// Tiles of up to 16 rows on AMX: the sums of integers of a group, 16 rows by 16 outputs, are one instruction. They are
// the same numbers that dot products give, and are added up in the same order, so both ways give the same bits.
namespace inflight {
namespace {

// Up to this many rows dot products are quicker than tiles. For groups of 16 they are quicker with any number of rows:
// there are twice as many sums to add up.
constexpr int64_t kFewAmxRows = kOpenedRows;

struct alignas(64) TileConfig {
    uint8_t palette = 1, first_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The configuration of the tiles. Loading one takes as long as ten products of tiles, so that is done only for a new
// one.
class TileState {
  public:
    TileState() = default;
    TileState(const TileState&) = delete;
    TileState& operator=(const TileState&) = delete;
    ~TileState() {
        if (rows_) _tile_release();
    }

    // For products: 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights. 0, 1 and 4 have the rows of one tile of a
    // product's input, 2, 3 and 5 the rows of another.
    void configure_products(int64_t rows, int64_t others, int steps) {
        if (rows == rows_ && others == others_) return;
        TileConfig config;
        for (int tile = 0; tile < 8; tile++) {
            bool inputs = tile == 4 || tile == 5, second = tile == 2 || tile == 3 || tile == 5;
            config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? steps : second ? others : rows);
            config.row_bytes[tile] = static_cast<uint16_t>(inputs ? steps * 4 : 64);
        }
        load(config, rows, others);
    }

    // For attention: 0 to 3 are sums; 4 and 5 are rows of 32 and of 16 values that meet those of 6 and 7.
    void configure_attention(int64_t rows) {
        if (rows == rows_) return;
        TileConfig config;
        for (int tile = 0; tile < 8; tile++) {
            config.rows[tile] = static_cast<uint8_t>(tile == 6 ? 16 : tile == 7 ? 8 : rows);
            config.row_bytes[tile] = static_cast<uint16_t>(tile == 5 ? 32 : 64);
        }
        load(config, rows, rows);
    }

  private:
    void load(const TileConfig& config, int64_t rows, int64_t others) {
        rows_ = rows;
        others_ = others;
        asm volatile("" ::: "memory");  // the compiler does not see that all of it is read
        _tile_loadconfig(&config);
    }

    int64_t rows_ = 0, others_ = 0;
};

struct Dots {
    alignas(64) int32_t of[2][2][16][kLanes];  // of two groups: [group][line][row]
};

// Sums of integers of two groups, or of one: into tiles. They take long, and none of them waits for another.
template <int Steps>
INLINE void sum_groups(int64_t rows, const Opened& chunk, int64_t group, bool both, const char* x) {
    constexpr int kGroups = 8 / Steps;
    auto inputs = [&](int64_t g) { return x + g / kGroups * kInputBlock * rows + g % kGroups * Steps * 4; };
    const uint8_t* codes = chunk.codes + group * Steps * 128;
    asm volatile("" ::: "memory");  // nor what tiles are loaded from
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, inputs(group), kInputBlock);
    _tile_loadd(6, codes, 128);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, codes + 64, 128);
    _tile_dpbsud(1, 4, 7);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(5, inputs(group + 1), kInputBlock);
        _tile_loadd(6, codes + Steps * 128, 128);
        _tile_dpbsud(2, 5, 6);
        _tile_loadd(7, codes + Steps * 128 + 64, 128);
        _tile_dpbsud(3, 5, 7);
    }
}

// And from there to where they can be added up.
INLINE void put_sums(bool both, Dots& to) {
    _tile_stored(0, to.of[0][0], 64);
    _tile_stored(1, to.of[0][1], 64);
    if (!both) return;
    _tile_stored(2, to.of[1][0], 64);
    _tile_stored(3, to.of[1][1], 64);
}

// What `tile_opened` does with them.
template <int Steps, bool Offsets, int Groups>
INLINE void add_groups(int64_t rows, const Opened& chunk, int64_t group, const float* scales, const int32_t* sums,
                       const Dots& dots, float* out) {
    F scale[Groups][2], offset[Groups][2];
    for (int g = 0; g < Groups; g++)
        for (int j = 0; j < 2; j++) {
            scale[g][j] = load(chunk.scales[group + g] + j * kLanes);
            if (Offsets) offset[g][j] = load(chunk.offsets[group + g] + j * kLanes);
        }
    for (int64_t m = 0; m < rows; m++) {
        F totals[2] = {load(out + m * kPanel), load(out + m * kPanel + kLanes)};
        for (int g = 0; g < Groups; g++) {
            F of = splat(scales[(group + g) * Steps / 8 * rows + m]), share = zero();
            I start = whole(0);
            if (Offsets)
                share = splat(reinterpret_cast<const float*>(sums)[(group + g) * rows + m]);
            else
                start = whole(sums[(group + g) * rows + m]);
            for (int j = 0; j < 2; j++) {
                I sum = _mm512_load_si512(dots.of[g][j][m]);
                if (!Offsets) sum = add(sum, start);
                totals[j] = fma(mul(to_float(sum), of), scale[g][j], totals[j]);
                if (Offsets) totals[j] = fma(offset[g][j], share, totals[j]);
            }
        }
        store(out + m * kPanel, totals[0]);
        store(out + m * kPanel + kLanes, totals[1]);
    }
}

// Most rows of a tile.
INLINE int64_t most_rows(const BlockForm& form) { return form.group == 16 ? kOpenedRows : kBlockRows; }

template <int Steps, bool Offsets>
void tile_rows(int64_t rows, const Opened& chunk, int64_t blocks, const char* x, const float* scales,
               const int32_t* sums, float* out, Ahead& ahead, TileState& state) {
    if (rows <= kFewAmxRows || Steps == 4)
        return tile_of<Steps, Offsets>(rows, Sizes{})(chunk, blocks, x, scales, sums, out, ahead);
    int64_t groups = blocks * 8 / Steps;
    Dots dots[2];
    state.configure_products(rows, rows, Steps);
    sum_groups<Steps>(rows, chunk, 0, groups > 1, x);
    put_sums(groups > 1, dots[0]);
    for (int64_t g = 0; g < groups; g += 2) {  // the next two are summed while these are added up
        const Dots& now = dots[g / 2 % 2];
        if (g + 2 < groups) sum_groups<Steps>(rows, chunk, g + 2, g + 3 < groups, x);
        ahead.some();
        ahead.some();
        if (g + 1 < groups)
            add_groups<Steps, Offsets, 2>(rows, chunk, g, scales, sums, now, out);
        else
            add_groups<Steps, Offsets, 1>(rows, chunk, g, scales, sums, now, out);
        if (g + 2 < groups) put_sums(g + 3 < groups, dots[(g / 2 + 1) % 2]);
    }
}

}  // namespace
}  // namespace inflight
