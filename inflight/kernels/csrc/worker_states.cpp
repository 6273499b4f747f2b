// What a thread does in recurrent layers.
#include <algorithm>
#include <cstring>

#include "worker.h"

namespace inflight {

// Calls work(tokens, unit, state) for the units of every row, `units` of them: a unit's part of a slot has `floats`
// from `at` on, and no other unit reads it. Its state is zero at a row's first token. Tokens are cut where states are
// saved.
template <class Work>
void Program::Worker::in_states(const Operation& op, int64_t at, int64_t units, int64_t floats, Work work) {
    const Slice& s = slice();
    each(static_cast<int64_t>(s.begins.size()) * units, [&](int64_t number) {
        const size_t row = static_cast<size_t>(number / units);
        const int64_t unit = number % units, first = s.begins[row], end = first + s.lengths[row];
        auto state_of = [&](int64_t slot) {
            return program.states_ + slot * program.state_floats_ + at + unit * floats;
        };
        float* state = state_of(s.step.states[s.tables[row]]);
        if (!s.step.positions[first]) std::memset(state, 0, static_cast<size_t>(floats) * 4);
        int64_t save = std::lower_bound(s.step.save_at, s.step.save_at + s.step.saves, first) - s.step.save_at;
        for (int64_t begin = first; begin < end;) {
            const bool saves = save < s.step.saves && s.step.save_at[save] < end;
            const int64_t stop = saves ? s.step.save_at[save] + 1 : end;
            work(RowTokens{stop - begin, buffer(op.from) + begin * width(op.from), width(op.from),
                           buffer(op.to) + begin * width(op.to), width(op.to)},
                 unit, state);
            if (saves) std::memcpy(state_of(s.step.save_to[save++]), state, static_cast<size_t>(floats) * 4);
            begin = stop;
        }
    });
}

void Program::Worker::recur(const Operation& op) {
    const Recurrent& layer = program.recurrent_[static_cast<size_t>(op.layer)];
    if (const Mamba* m = std::get_if<Mamba>(&layer)) return mamba(op, *m);
    if (const ShortConv* s = std::get_if<ShortConv>(&layer))
        return in_states(
            op, s->at, conv_units(s->channels), s->unit_floats(),
            [&](const RowTokens& row, int64_t unit, float* state) { kernels().short_conv(*s, row, unit, state); });
    // A unit is a key head with its value heads.
    const Delta& d = std::get<Delta>(layer);
    in_states(op, d.at, d.key_heads, d.head_floats(), [&](const RowTokens& row, int64_t head, float* state) {
        kernels().delta(d, row, head, state, recurrence.get());
    });
}

// Heads of a group share B and C, which pass the convolution too: it comes first, then the heads, then the norm, which
// may span them all.
void Program::Worker::mamba(const Operation& op, const Mamba& m) {
    in_states(op, m.at, conv_units(m.channels()), m.unit_floats(),
              [&](const RowTokens& row, int64_t unit, float* state) { kernels().mamba_conv(m, row, unit, state); });
    in_states(op, m.at + m.conv_floats(), m.heads, m.memory_floats(),
              [&](const RowTokens& row, int64_t head, float* state) {
                  kernels().mamba_head(m, row, head, state, recurrence.get());
              });
    each(slice().step.count, [&](int64_t token) {
        kernels().mamba_norm(m, buffer(op.from) + token * width(op.from), buffer(op.to) + token * width(op.to));
    });
}

}  // namespace inflight
