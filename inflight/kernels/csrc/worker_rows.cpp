// Operations over the rows of one buffer: tables of embeddings by layer, factors, gates.
#include "blocks.h"
#include "pack.h"
#include "worker.h"

namespace inflight {

// A row of a table as floats, times `scale`. Blocks are packed and opened as those of an embedding are.
void Program::Worker::read_row(const Table& table, int64_t row, float scale, float* out) {
    const char* from = table.data + row * table.row_bytes;
    if (is_block(table.row.format)) {
        const BlockRows rows{from, 1};
        pack_blocks(table.row, 0, &rows, 1, opened.get());
        Weights packed = table.row;
        packed.data = opened.get();
        return kernels().unpack(packed, 0, scale, out);
    }
    read_floats(from, table.source, 0, table.row.k, out);
    for (int64_t i = 0; i < table.row.k; i++) out[i] *= scale;
}

// to = factor * (norm(each part of `to`) + scale * the token's row of the table); a part is as wide as the norm.
void Program::Worker::add_table(const Operation& op) {
    const Table& table = program.tables_[static_cast<size_t>(op.layer)];
    const Norm norm = norm_of(op.norm, op);
    const int64_t columns = width(op.to),
                  part = static_cast<int64_t>(program.norms_[static_cast<size_t>(op.norm)].size());
    each(slice().step.count, [&](int64_t row) {
        float* x = buffer(op.to) + row * columns;
        float* added = reinterpret_cast<float*>(opened.get() + table.row.panel_bytes);
        read_row(table, slice().step.tokens[row], op.scale, added);
        for (int64_t i = 0; i < columns; i += part) kernels().norm(x + i, part, norm, false, 1.0f, x + i);
        for (int64_t i = 0; i < columns; i++) x[i] = (x[i] + added[i]) * op.factor;
    });
}

// to *= one number.
void Program::Worker::scale(const Operation& op) {
    const float factor = program.norms_[static_cast<size_t>(op.norm)][0];
    const int64_t columns = width(op.to);
    each(slice().step.count, [&](int64_t row) {
        float* x = buffer(op.to) + row * columns;
        for (int64_t i = 0; i < columns; i++) x[i] *= factor;
    });
}

// to = act(to) * columns of `from`.
void Program::Worker::gate_by(const Operation& op) {
    const int64_t columns = width(op.to);
    each(slice().step.count, [&](int64_t row) {
        float* x = buffer(op.to) + row * columns;
        kernels().gate(op.act, x, 1.0f, buffer(op.from) + row * width(op.from) + op.column, columns, x);
    });
}

// to = xIELU(to).
void Program::Worker::xielu(const Operation& op) {
    auto factor = [&](int number) { return program.norms_[static_cast<size_t>(number)][0]; };
    const float squares = factor(op.norm), exponentials = factor(op.second), all = factor(op.third);
    const int64_t columns = width(op.to);
    each(slice().step.count,
         [&](int64_t row) { kernels().xielu(squares, exponentials, all, columns, buffer(op.to) + row * columns); });
}

}  // namespace inflight
