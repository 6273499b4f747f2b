// The recurrent layers of a program and the slots of rows' states.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "program.h"

namespace inflight {

namespace {

// How many taps a convolution may have: the kernels keep so many inputs in registers.
void check_taps(int64_t taps) {
    if (taps < 2 || taps > 8)
        throw std::invalid_argument("a recurrent layer's convolution has " + std::to_string(taps) +
                                    " taps; 2 to 8 are supported");
}

}  // namespace

// An array of a recurrent layer by its norm's number; null: -1.
const float* Program::layer_array(int number, int64_t size) const {
    if (number < 0) return nullptr;
    const std::vector<float>& values = norms_.at(static_cast<size_t>(number));
    if (static_cast<int64_t>(values.size()) != size)
        throw std::invalid_argument("an array of a recurrent layer has " + std::to_string(values.size()) +
                                    " numbers, not " + std::to_string(size));
    return values.data();
}

// Gives the layer its part of a slot.
template <class Layer>
int Program::add_state(Layer layer) {
    layer.at = state_floats_;
    state_floats_ += layer.floats();
    recurrent_.push_back(layer);
    return static_cast<int>(recurrent_.size()) - 1;
}

int Program::add_delta(Delta layer, const std::vector<int>& arrays) {
    check_taps(layer.taps);
    if (layer.key_heads < 1 || layer.value_heads % layer.key_heads)
        throw std::invalid_argument("a recurrent layer's heads make no sense");
    layer.conv = layer_array(arrays.at(0), layer.taps * layer.channels());
    layer.decay = layer_array(arrays.at(1), layer.value_heads);
    layer.dt_bias = layer_array(arrays.at(2), layer.value_heads);
    layer.norm = layer_array(arrays.at(3), layer.value_dim);
    return add_state(layer);
}

int Program::add_short_conv(ShortConv layer, const std::vector<int>& arrays) {
    check_taps(layer.taps);
    layer.conv = layer_array(arrays.at(0), layer.taps * layer.channels);
    layer.bias = layer_array(arrays.at(1), layer.channels);
    return add_state(layer);
}

int Program::add_mamba(Mamba layer, const std::vector<int>& arrays) {
    check_taps(layer.taps);
    if (layer.groups < 1 || layer.heads % layer.groups || layer.head_dim < 1 || layer.state < 1)
        throw std::invalid_argument("a recurrent layer's heads make no sense");
    layer.conv = layer_array(arrays.at(0), layer.taps * layer.channels());
    layer.conv_bias = layer_array(arrays.at(1), layer.channels());
    layer.decay = layer_array(arrays.at(2), layer.heads);
    layer.step_bias = layer_array(arrays.at(3), layer.heads);
    layer.skip = layer_array(arrays.at(4), layer.heads);
    layer.norm = layer_array(arrays.at(5), layer.inner());
    return add_state(layer);
}

void Program::make_states(int64_t slots) {
    if (slots < 1 || !state_floats_) throw std::invalid_argument("states need slots and recurrent layers");
    state_memory_ = std::make_unique<Arena>();
    states_ = reinterpret_cast<float*>(state_memory_->take(slots * state_bytes()));
    slots_ = slots;
}

void Program::copy_state(int64_t from, int64_t to) {
    for (int64_t slot : {from, to})
        if (slot < 0 || slot >= slots_) throw std::out_of_range("there is no state " + std::to_string(slot));
    if (from == to) return;
    const int64_t pieces = 4 * pool_->size(), floats = state_floats_ / kLanes;
    std::atomic<int64_t> next{0};
    pool_->run([&](int) {
        for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) {
            const int64_t first = floats * piece / pieces * kLanes, end = floats * (piece + 1) / pieces * kLanes;
            std::memcpy(states_ + to * state_floats_ + first, states_ + from * state_floats_ + first,
                        static_cast<size_t>(end - first) * 4);
        }
    });
}

void Program::check_states(const Step& step) const {
    auto checked = [&](int64_t slot) {
        if (slot < 0 || slot >= slots_) throw std::out_of_range("there is no state " + std::to_string(slot));
    };
    if (!step.states) throw std::out_of_range("a model with recurrent layers needs the rows' states");
    for (int64_t row = 0; row < step.rows; row++) checked(step.states[row]);
    for (int64_t i = 0; i < step.saves; i++) {
        checked(step.save_to[i]);
        if (step.save_at[i] < (i ? step.save_at[i - 1] + 1 : 0) || step.save_at[i] >= step.count)
            throw std::out_of_range("the tokens behind which states are saved must ascend and lie in the step");
    }
}

int64_t Program::state_floats(int layer) const {
    return std::visit([](const auto& each) { return each.floats(); }, recurrent_[static_cast<size_t>(layer)]);
}

// Floats of scratch that a thread needs for so many tokens.
int64_t Program::state_scratch(int64_t rows) const {
    int64_t most = 0;
    for (const Recurrent& layer : recurrent_)
        most =
            std::max(most, std::holds_alternative<Delta>(layer) ? std::get<Delta>(layer).scratch_floats() : 2 * rows);
    return most;
}

// Arithmetic operations of one token.
double Program::state_operations(int layer) const {
    const Recurrent& found = recurrent_[static_cast<size_t>(layer)];
    if (const Delta* d = std::get_if<Delta>(&found))
        return 7.0 * static_cast<double>(d->value_heads * d->value_dim * d->key_dim);
    if (const Mamba* m = std::get_if<Mamba>(&found)) return 5.0 * static_cast<double>(m->inner() * m->state);
    const ShortConv& s = std::get<ShortConv>(found);
    return 2.0 * static_cast<double>((s.taps + 1) * s.channels);
}

}  // namespace inflight
