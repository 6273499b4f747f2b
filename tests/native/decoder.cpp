#include "decoder.h"

#include <algorithm>
#include <numeric>

#include "pack.h"

namespace inflight::testing {
namespace {

Matrix random_matrix(Random& random, int64_t n, int64_t k, bool bias) {
    return {n, k, random.values(n * k, 1.0f / std::sqrt(static_cast<float>(k))),
            bias ? random.values(n, 0.1f) : std::vector<float>()};
}

std::vector<float> random_norm(Random& random, int64_t n, bool centered) {
    std::vector<float> out = random.values(n, 0.3f);
    for (float& each : out) each += centered ? 0.0f : 1.0f;
    return out;
}

int add_matrix(Program& program, const Matrix& m, const Decoder& decoder, Format format, bool gated = false) {
    Weights w = describe(format, false, gated, m.n, m.k, decoder.group);
    char* data = program.allocate(packed_bytes(w));
    float* scales = reinterpret_cast<float*>(program.allocate(w.panels * kPanel * 4));
    for (int64_t panel = 0; panel < w.panels; panel++)
        pack_panel(w, panel, m.values.data(), Source::kFloat, data + panel * w.panel_bytes, scales + panel * kPanel);
    w.data = data;
    w.scales = format == Format::kInt8 ? scales : nullptr;
    return program.add_weights(w, m.bias.empty() ? nullptr : m.bias.data());
}

// Rows of a matrix as products of their own, the second of another type where they are integers.
std::vector<int> add_parts(Program& program, const Matrix& m, const Decoder& decoder,
                           const std::vector<int64_t>& rows) {
    std::vector<int> out;
    int64_t begin = 0;
    for (int64_t n : rows) {
        Matrix part{n, m.k, {m.values.begin() + begin * m.k, m.values.begin() + (begin + n) * m.k}, {}};
        if (!m.bias.empty()) part.bias.assign(m.bias.begin() + begin, m.bias.begin() + begin + n);
        bool other = out.size() == 1 && is_integer(decoder.format);
        out.push_back(add_matrix(program, part, decoder, other ? Format::kQ8_0 : decoder.format));
        begin += n;
    }
    return out;
}

using Vector = std::vector<double>;

Vector multiply(const Matrix& m, const Vector& x) {
    Vector out(static_cast<size_t>(m.n));
    for (size_t row = 0; row < out.size(); row++) {
        out[row] = m.bias.empty() ? 0.0 : m.bias[row];
        for (size_t i = 0; i < x.size(); i++) out[row] += m.values[row * x.size() + i] * x[i];
    }
    return out;
}

Vector norm_of(const Vector& x, const std::vector<float>& weight, bool centered) {
    double squares = 0.0;
    for (double each : x) squares += each * each;
    Vector out = x;
    for (size_t i = 0; i < x.size(); i++)
        out[i] *= (weight[i] + (centered ? 1.0 : 0.0)) / std::sqrt(squares / static_cast<double>(x.size()) + kEps);
    return out;
}

void turn(double* x, const Rope& rope, int64_t position, int64_t reach) {
    bool far = std::max(position + 1, reach) > rope.original;
    std::vector<float> inverse = far && !rope.far_inverse.empty() ? rope.far_inverse : rope.inverse;
    if (far && rope.stretch > 0) {
        double dim = 2.0 * static_cast<double>(inverse.size()),
               length = static_cast<double>(std::max(position + 1, reach));
        double grown = rope.stretch * length / static_cast<double>(rope.original) - (rope.stretch - 1);
        double base = rope.theta * std::pow(grown, dim / (dim - 2));
        for (size_t i = 0; i < inverse.size(); i++)
            inverse[i] = static_cast<float>(std::pow(base, -2.0 * static_cast<double>(i) / dim));
    }
    for (size_t i = 0, half = inverse.size(); i < half; i++) {
        double angle = static_cast<double>(position) * inverse[i], c = std::cos(angle) * rope.factor,
               s = std::sin(angle) * rope.factor;
        double a = x[i], b = x[half + i];
        x[i] = a * c - b * s;
        x[half + i] = b * c + a * s;
    }
}

Vector mlp(const Matrix& gate_up, const Matrix& down, Activation act, const Vector& x) {
    Vector both = multiply(gate_up, x), inner(both.size() / 2);
    for (size_t i = 0; i < inner.size(); i++) {
        const auto [gate, up] = gated(act, both[i], both[inner.size() + i]);
        inner[i] = gate * up;
    }
    return multiply(down, inner);
}

// One layer over what it has seen: keys and values of former positions, [positions][kv_heads * dim].
struct Seen {
    std::vector<Vector> keys, values;
};

Vector attend(const DecoderLayer& layer, const Decoder& decoder, Vector qkv, Seen& seen, int64_t reach) {
    const Attention& a = layer.attention;
    int64_t position = static_cast<int64_t>(seen.keys.size()), group = a.heads / a.kv_heads;
    for (int64_t head = 0; head < a.heads + a.kv_heads; head++) {
        Vector one(qkv.begin() + head * a.dim, qkv.begin() + (head + 1) * a.dim);
        if (layer.head_norms) one = norm_of(one, head < a.heads ? layer.query_norm : layer.key_norm, decoder.centered);
        if (layer.rope >= 0) turn(one.data(), decoder.ropes[static_cast<size_t>(layer.rope)], position, reach);
        std::copy(one.begin(), one.end(), qkv.begin() + head * a.dim);
    }
    auto key = qkv.begin() + a.heads * a.dim, value = key + a.kv_heads * a.dim;
    seen.keys.emplace_back(key, value);
    seen.values.emplace_back(value, qkv.end());
    Vector out(static_cast<size_t>(a.heads * a.dim), 0.0);
    for (int64_t head = 0; head < a.heads; head++) {
        size_t begin = static_cast<size_t>(a.window ? std::max<int64_t>(0, position + 1 - a.window) : 0);
        Vector scores;
        for (size_t p = begin; p < seen.keys.size(); p++) {
            double score = 0.0;
            for (int64_t d = 0; d < a.dim; d++)
                score += qkv[static_cast<size_t>(head * a.dim + d)] *
                         seen.keys[p][static_cast<size_t>(head / group * a.dim + d)];
            score *= a.scale;
            scores.push_back(a.softcap != 0.0f ? a.softcap * std::tanh(score / a.softcap) : score);
        }
        double peak = *std::max_element(scores.begin(), scores.end()), total = 0.0;
        for (double& score : scores) total += score = std::exp(score - peak);
        for (size_t p = begin; p < seen.keys.size(); p++)
            for (int64_t d = 0; d < a.dim; d++)
                out[static_cast<size_t>(head * a.dim + d)] +=
                    scores[p - begin] / total * seen.values[p][static_cast<size_t>(head / group * a.dim + d)];
    }
    return out;
}

// False where the last expert that is chosen is hardly likelier than the next.
bool mixture(const DecoderLayer& layer, const Vector& logits, const Vector& x, Vector& out) {
    std::vector<size_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    size_t chosen = static_cast<size_t>(layer.chosen);
    double total = 0.0, taken = 0.0;
    for (size_t i = 0; i < order.size(); i++) {
        total += std::exp(logits[order[i]]);
        if (i < chosen) taken += std::exp(logits[order[i]]);
    }
    for (size_t i = 0; i < chosen; i++) {
        Vector one = mlp(layer.gate_up[order[i]], layer.down[order[i]], layer.act, x);
        double share = std::exp(logits[order[i]]) / (layer.normalise ? taken : total);
        for (size_t d = 0; d < out.size(); d++) out[d] += share * one[d];
    }
    return chosen == order.size() || logits[order[chosen - 1]] - logits[order[chosen]] > 1e-3;
}

}  // namespace

Decoder random_decoder(Random& random, Format format, int64_t hidden) {
    Decoder d;
    d.format = format;
    d.hidden = hidden ? hidden : random.pick<int64_t>({20, 32, 48});
    d.inner = random.pick<int64_t>({24, 40, 64});
    d.vocabulary = random.between(30, 70);
    d.table_format = d.format == Format::kFloat ? Format::kFloat : random.pick({Format::kBf16, Format::kGroup8});
    d.group = random.pick<int64_t>({8, 16, 24, 32});
    d.parts = random.maybe();
    d.kv = d.format == Format::kFloat ? KvType::kFloat : random.pick({KvType::kFloat, KvType::kBf16, KvType::kInt8});
    d.block_size = random.pick<int64_t>({16, 32, 5, 24});
    d.centered = random.maybe();
    d.embedding_scale = random.pick({1.0f, 5.5f});
    d.residual_scale = random.pick({1.0f, 0.4f});
    d.divider = random.pick({1.0f, 2.0f});
    d.softcap = random.pick({0.0f, 5.0f});
    bool alike = random.maybe();
    for (size_t number = 0; number < 2; number++) {
        DecoderLayer layer;
        Attention& a = layer.attention;
        a.kv_heads = random.between(1, 2);
        a.heads = a.kv_heads * random.pick<int64_t>({1, 3, 4});
        a.dim = random.pick<int64_t>({16, 20, 32});
        if (number && alike) a = d.layers[0].attention;
        a.depth = (a.dim + 15) / 16 * 16;
        a.scale = 0.25f;
        a.window = random.pick<int64_t>({0, 0, 9, 100});
        a.softcap = random.pick({0.0f, 0.0f, 10.0f});
        Rope rope{{}, {}, random.pick({1.0f, 1.2f}), 30};
        int64_t half = random.pick<int64_t>({a.dim / 2, a.dim / 4});
        for (int64_t i = 0; i < half; i++)
            rope.inverse.push_back(std::pow(100.0f, -static_cast<float>(i) / static_cast<float>(half)));
        if (random.maybe())
            for (float each : rope.inverse) rope.far_inverse.push_back(each / 3.0f);
        else if (random.maybe())
            rope.theta = 100.0, rope.stretch = 2.5;
        d.ropes.push_back(rope);
        layer.rope = random.between(0, 4) ? static_cast<int>(number) : -1;
        layer.head_norms = random.maybe();
        layer.post_norm = random.maybe();
        layer.act = random.pick({Activation::kSilu, Activation::kGeluTanh, Activation::kGelu, Activation::kRelu,
                                 Activation::kSwigluClamped});
        layer.qkv = random_matrix(random, (a.heads + 2 * a.kv_heads) * a.dim, d.hidden, random.maybe());
        layer.out = random_matrix(random, d.hidden, a.heads * a.dim, random.maybe());
        int64_t experts = number ? random.between(2, 6) : 1;
        layer.chosen = number ? random.between(1, std::min<int64_t>(3, experts)) : 0;
        layer.normalise = random.maybe();
        layer.router = random_matrix(random, experts, d.hidden, false);
        for (int64_t i = 0; i < experts; i++) {
            layer.gate_up.push_back(random_matrix(random, 2 * d.inner, d.hidden, false));
            layer.down.push_back(random_matrix(random, d.hidden, d.inner, false));
        }
        layer.input_norm = random_norm(random, d.hidden, d.centered);
        layer.attention_norm = random_norm(random, d.hidden, d.centered);
        layer.mlp_norm = random_norm(random, d.hidden, d.centered);
        layer.query_norm = random_norm(random, a.dim, d.centered);
        layer.key_norm = random_norm(random, a.dim, d.centered);
        d.layers.push_back(layer);
    }
    d.table = random_matrix(random, d.vocabulary, d.hidden, false);
    d.head = random_matrix(random, d.vocabulary, d.hidden, false);
    d.last_norm = random_norm(random, d.hidden, d.centered);
    return d;
}

Engine::Engine(const Decoder& d, const Kernels& kernels, int threads, int64_t blocks)
    : program(threads, kernels.name), block_size(d.block_size), vocabulary(d.vocabulary), hidden(d.hidden) {
    int x = program.add_buffer(d.hidden), other = program.add_buffer(d.hidden);
    last = program.add_buffer(d.hidden);
    logits = program.add_buffer(d.vocabulary);
    int inner = program.add_buffer(d.inner);
    for (const Rope& rope : d.ropes) program.add_rope(rope);
    auto norm = [&](Operation& op, const std::vector<float>& weight) {
        op.norm = program.add_norm(weight.data(), static_cast<int64_t>(weight.size()));
        op.eps = kEps;
        op.centered = d.centered;
    };
    auto op = [](OpCode code, int from, int to) {
        Operation out;
        out.code = code;
        out.from = from;
        out.to = to;
        return out;
    };
    Operation embed = op(OpCode::kEmbed, x, x);
    embed.products = {add_matrix(program, d.table, d, d.table_format)};
    embed.scale = d.embedding_scale;
    program.add(embed);
    for (const DecoderLayer& layer : d.layers) {
        const Attention& a = layer.attention;
        int number = program.add_layer(a), qkv = program.add_buffer((a.heads + 2 * a.kv_heads) * a.dim),
            attended = program.add_buffer(a.heads * a.dim);
        Operation project = op(OpCode::kProduct, x, qkv), rotate = op(OpCode::kRotate, qkv, qkv),
                  attend = op(OpCode::kAttend, qkv, attended);
        if (d.parts)
            project.products =
                add_parts(program, layer.qkv, d, {a.heads * a.dim, a.kv_heads * a.dim, a.kv_heads * a.dim});
        else
            project.products = {add_matrix(program, layer.qkv, d, d.format)};
        norm(project, layer.input_norm);
        rotate.layer = attend.layer = number;
        rotate.rope = layer.rope;
        if (layer.head_norms) {
            norm(rotate, layer.query_norm);
            rotate.second = program.add_norm(layer.key_norm.data(), a.dim);
        }
        Operation out = op(OpCode::kProduct, attended, layer.post_norm ? other : x),
                  added = op(OpCode::kNorm, other, x);
        out.products = {add_matrix(program, layer.out, d, d.format)};
        out.mode = layer.post_norm ? Mode::kStore : Mode::kAdd;
        added.mode = Mode::kAdd;
        out.scale = added.scale = d.residual_scale;
        norm(added, layer.attention_norm);
        for (const Operation& each : {project, rotate, attend, out}) program.add(each);
        if (layer.post_norm) program.add(added);
        if (layer.chosen) {
            int router_logits = program.add_buffer(layer.router.n);
            Operation router = op(OpCode::kProduct, x, router_logits), mixture = op(OpCode::kMixture, x, router_logits);
            router.products = {add_matrix(program, layer.router, d, Format::kFloat)};
            norm(router, layer.mlp_norm);
            norm(mixture, layer.mlp_norm);
            mixture.routing.chosen = static_cast<int>(layer.chosen);
            mixture.routing.normalise = layer.normalise;
            mixture.act = layer.act;
            mixture.scale = d.residual_scale;
            for (const Matrix& each : layer.gate_up)
                mixture.gate_up.push_back(add_matrix(program, each, d, d.format, true));
            for (const Matrix& each : layer.down) mixture.down.push_back(add_matrix(program, each, d, d.format));
            program.add(router);
            program.add(mixture);
        } else {
            Operation gate = op(OpCode::kProduct, x, inner), down = op(OpCode::kProduct, inner, x);
            norm(gate, layer.mlp_norm);
            if (d.parts) {
                gate.to = program.add_buffer(2 * d.inner);
                gate.products = add_parts(program, layer.gate_up[0], d, {d.inner, d.inner});
                program.add(gate);
                gate = op(OpCode::kGate, gate.to, inner);
            } else {
                gate.products = {add_matrix(program, layer.gate_up[0], d, d.format, true)};
                gate.mode = Mode::kGate;
            }
            gate.act = layer.act;
            down.products = {add_matrix(program, layer.down[0], d, d.format)};
            down.mode = Mode::kAdd;
            down.scale = d.residual_scale;
            program.add(gate);
            program.add(down);
        }
    }
    Operation gather = op(OpCode::kGather, x, last), head = op(OpCode::kProduct, last, logits),
              cap = op(OpCode::kCap, logits, logits);
    norm(gather, d.last_norm);
    head.products = {add_matrix(program, d.head, d, d.format)};
    cap.scale = d.divider;
    cap.softcap = d.softcap;
    for (const Operation& each : {gather, head, cap}) program.add(each);
    program.make_caches(blocks, d.block_size, d.kv);
}

std::vector<double> reference(const Decoder& d, const std::vector<int64_t>& tokens, int64_t reach) {
    std::vector<Seen> seen(d.layers.size());
    std::vector<double> logits;
    for (int64_t token : tokens) {
        Vector x(static_cast<size_t>(d.hidden));
        for (size_t i = 0; i < x.size(); i++)
            x[i] = d.table.values[static_cast<size_t>(token) * x.size() + i] * d.embedding_scale;
        auto add = [&](const Vector& more) {
            for (size_t i = 0; i < x.size(); i++) x[i] += d.residual_scale * more[i];
        };
        for (size_t number = 0; number < d.layers.size(); number++) {
            const DecoderLayer& layer = d.layers[number];
            Vector out = multiply(
                layer.out,
                attend(layer, d, multiply(layer.qkv, norm_of(x, layer.input_norm, d.centered)), seen[number], reach));
            add(layer.post_norm ? norm_of(out, layer.attention_norm, d.centered) : out);
            Vector inputs = norm_of(x, layer.mlp_norm, d.centered), more(x.size(), 0.0);
            if (!layer.chosen)
                more = mlp(layer.gate_up[0], layer.down[0], layer.act, inputs);
            else if (!mixture(layer, multiply(layer.router, inputs), inputs, more))
                return logits;
            add(more);
        }
        for (double each : multiply(d.head, norm_of(x, d.last_norm, d.centered))) {
            each /= d.divider;
            logits.push_back(d.softcap != 0.0f ? d.softcap * std::tanh(each / d.softcap) : each);
        }
    }
    return logits;
}

}  // namespace inflight::testing
