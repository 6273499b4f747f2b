// The enumerations in Python. inflight/kernels/library.py takes them from here, so that no number stands twice.
#include <nanobind/nanobind.h>

#include "pack.h"
#include "program.h"

namespace nb = nanobind;
using namespace inflight;

void bind_enums(nb::module_& m) {
    nb::enum_<Format>(m, "Format", nb::is_arithmetic())
        .value("FLOAT", Format::kFloat)
        .value("BF16", Format::kBf16)
        .value("INT8", Format::kInt8)
        .value("GROUP8", Format::kGroup8)
        .value("GROUP4", Format::kGroup4)
        .value("Q8_0", Format::kQ8_0)
        .value("Q4_0", Format::kQ4_0)
        .value("Q4_1", Format::kQ4_1)
        .value("Q5_0", Format::kQ5_0)
        .value("Q5_1", Format::kQ5_1)
        .value("Q2_K", Format::kQ2_K)
        .value("Q3_K", Format::kQ3_K)
        .value("Q4_K", Format::kQ4_K)
        .value("Q5_K", Format::kQ5_K)
        .value("Q6_K", Format::kQ6_K)
        .value("IQ4_NL", Format::kIq4Nl)
        .value("IQ4_XS", Format::kIq4Xs)
        .value("MXFP4", Format::kMxfp4);
    nb::enum_<KvType>(m, "KvType", nb::is_arithmetic())
        .value("FLOAT", KvType::kFloat)
        .value("BF16", KvType::kBf16)
        .value("INT8", KvType::kInt8);
    nb::enum_<Activation>(m, "Activation", nb::is_arithmetic())
        .value("SILU", Activation::kSilu)
        .value("GELU", Activation::kGelu)
        .value("GELU_TANH", Activation::kGeluTanh)
        .value("RELU", Activation::kRelu)
        .value("GELU_QUICK", Activation::kGeluQuick)
        .value("SWIGLU_CLAMPED", Activation::kSwigluClamped)
        .value("RELU_SQUARED", Activation::kReluSquared);
    nb::enum_<Source>(m, "Source", nb::is_arithmetic())
        .value("FLOAT", Source::kFloat)
        .value("BF16", Source::kBf16)
        .value("HALF", Source::kHalf);
    nb::enum_<Mode>(m, "Mode", nb::is_arithmetic())
        .value("STORE", Mode::kStore)
        .value("ADD", Mode::kAdd)
        .value("GATE", Mode::kGate)
        .value("ACTIVATE", Mode::kActivate);
    nb::enum_<OpCode>(m, "OpCode", nb::is_arithmetic())
        .value("EMBED", OpCode::kEmbed)
        .value("PRODUCT", OpCode::kProduct)
        .value("ROTATE", OpCode::kRotate)
        .value("ATTEND", OpCode::kAttend)
        .value("NORM", OpCode::kNorm)
        .value("GATHER", OpCode::kGather)
        .value("CAP", OpCode::kCap)
        .value("MIXTURE", OpCode::kMixture)
        .value("GATE", OpCode::kGate)
        .value("ADD_ROWS", OpCode::kAddRows)
        .value("RECUR", OpCode::kRecur)
        .value("OUTPUT_GATE", OpCode::kOutputGate)
        .value("SCALE", OpCode::kScale)
        .value("ADD_TABLE", OpCode::kAddTable)
        .value("GATE_BY", OpCode::kGateBy)
        .value("XIELU", OpCode::kXielu)
        .value("END_UNWANTED", OpCode::kEndUnwanted)
        .value("HEADS", OpCode::kHeads)
        .value("LATENT", OpCode::kLatent);
}
