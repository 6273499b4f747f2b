// A float as three bfloat16, see amx_split.inc.h, and rows of inputs in that form.
namespace inflight {
namespace {

constexpr int64_t kSplitInputs = 32;                          // of a block: those of a tile
constexpr int64_t kSplitRow = split_row_bytes(kSplitInputs);  // of a row's block: its parts
constexpr int kNotNumbers = 0x99;                             // of fpclass: NaN, infinities

// The parts of 16 floats as their bits; the lower halves of `hi` and `mid` are zero. `Safe`: their sum is the float for
// every float, infinities, NaNs and those that would be rounded to an infinity too; else such give a NaN or an infinity
// in some part.
struct Parts {
    I hi, mid, lo;
};

template <bool Safe>
INLINE Parts parts_of(F x) {
    const I upper = whole(static_cast<int32_t>(0xffff0000u)), half = whole(0x8000), bits = _mm512_castps_si512(x);
    Parts out;
    out.hi = _mm512_and_si512(add(bits, half), upper);
    F rest;
    if (Safe) {
        const __mmask16 huge = _mm512_cmpge_epu32_mask(_mm512_and_si512(bits, whole(0x7fffffff)), whole(0x7f7f8000));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        out.hi = _mm512_mask_and_epi32(out.hi, huge, bits, upper);
        out.hi = _mm512_mask_or_epi32(out.hi, nan, out.hi, whole(0x400000));
        rest = _mm512_maskz_sub_ps(static_cast<__mmask16>(~_mm512_fpclass_ps_mask(x, kNotNumbers)), x,
                                   _mm512_castsi512_ps(out.hi));
    } else {
        rest = sub(x, _mm512_castsi512_ps(out.hi));
    }
    out.mid = _mm512_and_si512(add(_mm512_castps_si512(rest), half), upper);
    out.lo = _mm512_castps_si512(sub(rest, _mm512_castsi512_ps(out.mid)));
    return out;
}

// 16 inputs of a row, at their place in the first part of a block of `rows` rows: [part][row][32].
INLINE void put_parts(F x, char* at, int64_t rows) {
    const Parts parts = parts_of<true>(x);
    const I all[3] = {parts.hi, parts.mid, parts.lo};
    for (I part : all) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(part, 16)));
        at += rows * kSplitInputs * 2;
    }
}

}  // namespace
}  // namespace inflight
