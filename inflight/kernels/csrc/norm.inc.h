// Norms of rows.
namespace inflight {
namespace {

float norm_factor(const float* x, int64_t n, float eps) {
    F squares = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        F v = load_part(x + i, n - i);
        squares = fma(v, v, squares);
    }
    return 1.0f / sqrtf(sum(squares) / static_cast<float>(n) + eps);
}

INLINE F normed(F x, F factor, const Norm& norm, int64_t i, int64_t left) {
    F weight = load_part(norm.weight + i, left);
    return mul(mul(x, factor), norm.centered ? add(splat(1.0f), weight) : weight);
}

void norm_row(const float* x, int64_t n, Norm norm, bool added, float scale, float* out) {
    F factor = splat(norm_factor(x, n, norm.eps));
    for (int64_t i = 0; i < n; i += kLanes) {
        F y = normed(load_part(x + i, n - i), factor, norm, i, n - i);
        store_part(out + i, added ? fma(y, splat(scale), load_part(out + i, n - i)) : y, n - i);
    }
}

}  // namespace
}  // namespace inflight
