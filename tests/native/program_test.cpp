// A decoder from tokens to logits: alone or in a crowd, whole or in pieces, on one thread or two, to the bit.
#include <algorithm>

#include "decoder.h"
#include "tests.h"

namespace inflight::testing {
namespace {

struct Request {
    std::vector<int64_t> tokens;
    std::vector<int32_t> table;
    std::vector<float> logits;  // of all tokens, as one run of the whole prompt gave them
    int64_t done = 0;
    int64_t reach = 0;  // its tokens turn as those of a sequence of this length at least
};

// The arrays of one step; what an engine is given, and where it writes.
struct Arrays {
    std::vector<int64_t> tokens, positions, slots, lengths, logits_at, reach;
    bool far = false;
    std::vector<int32_t> tables;
    int64_t table_width = 0;
    std::vector<int64_t> until, image_at;  // empty: none

    void add(const Request& request, int64_t first, int64_t count, int64_t block_size) {
        for (int64_t position = first; position < first + count; position++) {
            tokens.push_back(request.tokens[static_cast<size_t>(position)]);
            positions.push_back(position);
            reach.push_back(std::max(position + 1, request.reach));
            far |= request.reach > position + 1;
            slots.push_back(request.table[static_cast<size_t>(position / block_size)] * block_size +
                            position % block_size);
        }
        lengths.push_back(count);
        // Blocks that these tokens do not see yet are none of the program's business.
        for (int64_t i = 0; i < table_width; i++)
            tables.push_back(i <= (first + count - 1) / block_size ? request.table[static_cast<size_t>(i)] : -1);
    }
    Step step() const {
        Step step{tokens.data(),
                  positions.data(),
                  slots.data(),
                  lengths.data(),
                  tables.data(),
                  logits_at.data(),
                  static_cast<int64_t>(tokens.size()),
                  static_cast<int64_t>(lengths.size()),
                  table_width,
                  static_cast<int64_t>(logits_at.size()),
                  far ? reach.data() : nullptr};
        step.until = until.empty() ? nullptr : until.data();
        step.image_at = image_at.data();
        step.images = static_cast<int64_t>(image_at.size());
        return step;
    }
};

struct Output {
    Exact<float> logits, hidden;
    Exact<int64_t> best;
    Output(const Engine& engine, int64_t wanted)
        : logits(wanted * engine.vocabulary, kUnset), hidden(wanted * engine.hidden, kUnset), best(wanted, -7) {}
    void run(Engine& engine, const Step& step) {
        engine.program.run(step, {logits.get(), hidden.get(), engine.last, best.get()});
    }
    bool untouched() const {
        for (int64_t i = 0; i < logits.size(); i++)
            if (logits[i] != kUnset) return false;
        for (int64_t i = 0; i < hidden.size(); i++)
            if (hidden[i] != kUnset) return false;
        for (int64_t i = 0; i < best.size(); i++)
            if (best[i] != -7) return false;
        return true;
    }
};

int64_t blocks_of(const Decoder& decoder, int64_t tokens) {
    return (tokens + decoder.block_size - 1) / decoder.block_size;
}

std::vector<Request> random_requests(Random& random, const Decoder& decoder, const std::vector<int64_t>& lengths,
                                     int64_t& blocks) {
    std::vector<Request> out;
    blocks = 2;
    for (int64_t length : lengths) blocks += blocks_of(decoder, length);
    std::vector<int32_t> all;
    for (int32_t block = 0; block < blocks; block++) all.push_back(block);
    random.shuffle(all);
    for (int64_t length : lengths) {
        Request request;
        for (int64_t i = 0; i < length; i++) request.tokens.push_back(random.between(0, decoder.vocabulary - 1));
        for (int64_t i = blocks_of(decoder, length); i > 0; i--) {
            request.table.push_back(all.back());
            all.pop_back();
        }
        request.reach = random.pick<int64_t>({0, length / 2});
        out.push_back(request);
    }
    return out;
}

int64_t widest(const std::vector<Request>& requests) {
    size_t most = 0;
    for (const Request& request : requests) most = std::max(most, request.table.size());
    return static_cast<int64_t>(most);
}

// Every request by itself, its tokens in one step.
void run_alone(Engine& engine, std::vector<Request>& requests) {
    for (Request& request : requests) {
        Arrays arrays;
        arrays.table_width = widest(requests);
        int64_t count = static_cast<int64_t>(request.tokens.size());
        arrays.add(request, 0, count, engine.block_size);
        for (int64_t i = 0; i < count; i++) arrays.logits_at.push_back(i);
        Output output(engine, count);
        output.run(engine, arrays.step());
        request.logits.assign(output.logits.get(), output.logits.get() + count * engine.vocabulary);
    }
}

// Random companies and pieces; beyond the first 512 positions, mostly one token at a time.
void run_together(Engine& engine, std::vector<Request> requests, Random& random) {
    while (true) {
        Arrays arrays;
        arrays.table_width = widest(requests) + random.between(0, 2);
        std::vector<const float*> wanted;
        std::vector<size_t> order(requests.size());
        for (size_t i = 0; i < order.size(); i++) order[i] = i;
        random.shuffle(order);
        bool left = false;
        for (size_t i : order) {
            Request& request = requests[i];
            int64_t rest = static_cast<int64_t>(request.tokens.size()) - request.done;
            left |= rest > 0;
            if (!rest || !random.between(0, 3)) continue;
            int64_t count = std::min(rest, random.pick<int64_t>({1, 1, random.between(1, 12), 200, 1000}));
            if (request.done >= 512 && random.between(0, 4))
                count = 1;
            else if (request.done < 512 && request.done + count > 512 && random.maybe())
                count = 512 - request.done;
            int64_t begin = static_cast<int64_t>(arrays.tokens.size());
            arrays.add(request, request.done, count, engine.block_size);
            for (int64_t token = 0; token < count; token++) {
                if (token + 1 < count && random.maybe()) continue;
                arrays.logits_at.push_back(begin + token);
                wanted.push_back(request.logits.data() + (request.done + token) * engine.vocabulary);
            }
            request.done += count;
        }
        if (!left) return;
        if (arrays.tokens.empty()) continue;
        if (!random.between(0, 5)) arrays.logits_at.clear(), wanted.clear();
        Output output(engine, static_cast<int64_t>(wanted.size()));
        output.run(engine, arrays.step());
        for (size_t row = 0; row < wanted.size(); row++) {
            const float* got = output.logits.get() + static_cast<int64_t>(row) * engine.vocabulary;
            CHECK(same_bits(got, wanted[row], engine.vocabulary), "logits at position ",
                  arrays.positions[static_cast<size_t>(arrays.logits_at[row])], " of ", arrays.lengths.size(),
                  " rows with ", arrays.tokens.size(), " tokens are others than those of the whole prompt alone");
            int64_t best = std::max_element(got, got + engine.vocabulary) - got;
            CHECK(output.best[static_cast<int64_t>(row)] == best, "not the best token");
        }
    }
}

// The second half of every request, one token at a time, in arrays that the program goes on in.
void run_decoding(Engine& engine, const std::vector<Request>& requests, Random& random) {
    int64_t table_width = widest(requests) + random.between(0, 2), count = static_cast<int64_t>(requests.size()),
            width = 1;
    for (const Request& request : requests) width = std::max(width, static_cast<int64_t>(request.tokens.size()) + 1);
    Exact<int32_t> tokens(count * width, -1), tables(count * table_width, -1);
    Exact<int64_t> known(count), computed(count);
    int64_t steps = INT64_MAX;
    for (int64_t row = 0; row < count; row++) {
        const Request& request = requests[static_cast<size_t>(row)];
        int64_t length = static_cast<int64_t>(request.tokens.size()), half = length / 2;
        std::copy(request.table.begin(), request.table.end(), tables.get() + row * table_width);
        for (int64_t i = 0; i < length; i++)
            tokens[row * width + i] = static_cast<int32_t>(request.tokens[static_cast<size_t>(i)]);
        computed[row] = half;
        known[row] = half + 1;
        steps = std::min(steps, length - half);
        if (!half) continue;
        Arrays arrays;
        arrays.table_width = table_width;
        arrays.add(request, 0, half, engine.block_size);
        Output output(engine, 0);
        output.run(engine, arrays.step());
    }
    DecodeBatch batch{tokens.get(), width, tables.get(), table_width, known.get(), computed.get(), count};
    for (int64_t step = 0; step < steps; step++) {
        Output output(engine, count);
        bool append = random.maybe();
        engine.program.decode(batch, append,
                              {output.logits.get(), output.hidden.get(), engine.last, output.best.get()});
        for (int64_t row = 0; row < count; row++) {
            const Request& request = requests[static_cast<size_t>(row)];
            int64_t length = static_cast<int64_t>(request.tokens.size()), at = length / 2 + step;
            CHECK(computed[row] == at + 1 && known[row] == at + 1 + append, "what is known of row ", row);
            CHECK(same_bits(output.logits.get() + row * engine.vocabulary,
                            request.logits.data() + at * engine.vocabulary, engine.vocabulary),
                  "logits at position ", at, " are others than those of the whole prompt alone");
            if (append) CHECK(tokens[row * width + at + 1] == output.best[row], "another token than the best is known");
            if (at + 1 < length)
                tokens[row * width + at + 1] = static_cast<int32_t>(request.tokens[static_cast<size_t>(at + 1)]);
            known[row] = at + 2;
        }
    }
    auto refuses = [&](const char* what) {
        Output output(engine, count);
        Exact<int64_t> before(count);
        std::copy_n(computed.get(), count, before.get());
        check_throws<std::out_of_range>(
            [&] { engine.program.decode(batch, true, {output.logits.get(), nullptr, engine.last, output.best.get()}); },
            what);
        CHECK(output.untouched() && std::equal(before.get(), before.get() + count, computed.get()),
              "a step that was refused left something behind: ", what);
    };
    for (int64_t bad : {int64_t(-1), width, width - 1, INT64_MAX, INT64_MIN, table_width * engine.block_size}) {
        int64_t was = computed[count - 1];
        computed[count - 1] = bad;
        known[count - 1] = bad == INT64_MAX ? bad : bad + 1;
        refuses("a place outside");
        computed[count - 1] = was;
        known[count - 1] = was + 2;
        refuses("a row that does not decode");
    }
}

void check_reference(const Decoder& decoder, const Request& request) {
    std::vector<double> want = reference(decoder, request.tokens, request.reach);
    double size = 0.0;
    for (double each : want) size = std::max(size, std::fabs(each));
    for (size_t i = 0; i < want.size(); i++)
        CHECK_NEAR(request.logits[i], want[i], 1e-3 * size, "logit of position ",
                   static_cast<int64_t>(i) / decoder.vocabulary);
}

void one(const Kernels& kernels, Random& random, const Decoder& decoder, bool long_too) {
    int64_t blocks;
    std::vector<int64_t> lengths =
        long_too ? std::vector<int64_t>{530, 7, 40} : std::vector<int64_t>{1, 70, 11, 33, 16};
    std::vector<Request> requests = random_requests(random, decoder, lengths, blocks);
    Engine alone(decoder, kernels, 1, blocks);
    run_alone(alone, requests);
    bool floats = decoder.format == Format::kFloat && decoder.kv == KvType::kFloat;
    for (const Request& request : requests)
        if (floats) check_reference(decoder, request);
    for (int threads : {1, 2}) {
        Engine engine(decoder, kernels, threads, blocks);
        std::vector<Request> former = random_requests(random, decoder, lengths, blocks);
        engine.program.measure(threads == 2);
        if (threads == 2 && !long_too) run_alone(engine, former);  // what they leave in the blocks is nobody's business
        run_together(engine, requests, random);
        run_decoding(engine, requests, random);
        for (const Cost& cost : engine.program.costs())
            CHECK(threads == 1 || (cost.seconds > 0.0 && cost.bytes >= 0.0 && cost.operations >= 0.0),
                  "a cost is missing");
    }
}

}  // namespace

void programs(const Kernels& kernels, Random& random) {
    auto checked = [&](const Decoder& decoder, bool long_too) {
        try {
            one(kernels, random, decoder, long_too);
        } catch (const std::runtime_error& error) {
            fail("hidden ", decoder.hidden, ", format ", static_cast<int>(decoder.format), ", group ", decoder.group,
                 ", cache ", static_cast<int>(decoder.kv), ", blocks of ", decoder.block_size, ": ", error.what());
        }
    };
    for (Format format :
         {Format::kFloat, Format::kBf16, Format::kInt8, Format::kGroup8, Format::kGroup4, Format::kQ4_0})
        checked(random_decoder(random, format), false);
    // Contexts of several chunks, prompts of several slices; once with fewer inputs than rows.
    checked(random_decoder(random, random.pick({Format::kFloat, Format::kBf16, Format::kGroup4})), true);
    checked(random_decoder(random, Format::kInt8, 16), true);
}

namespace {

// A step that is fine, to be spoiled.
struct Scene {
    int64_t blocks = 0;
    Decoder decoder;
    std::vector<Request> requests;
    Engine engine;
    Arrays fine;

    explicit Scene(Random random)
        : decoder(random_decoder(random, Format::kFloat)),
          requests(random_requests(random, decoder, {40, 33}, blocks)),
          engine(decoder, *choose(""), 2, blocks) {
        fine.table_width = widest(requests);
        fine.add(requests[0], 0, 38, decoder.block_size);
        fine.add(requests[1], 0, 33, decoder.block_size);
        fine.logits_at = {0, 37, 70};
    }
    void refuses(const char* what, const Arrays& arrays) {
        Output output(engine, static_cast<int64_t>(arrays.logits_at.size()));
        check_throws<std::out_of_range>([&] { output.run(engine, arrays.step()); }, what);
        CHECK(output.untouched(), "a step that was refused left something behind: ", what);
    }
    // The next token of the first request, which sees all that was kept of it.
    Output next() {
        Arrays arrays;
        arrays.table_width = fine.table_width;
        arrays.add(requests[0], 38, 1, decoder.block_size);
        arrays.logits_at = {0};
        Output output(engine, 1);
        output.run(engine, arrays.step());
        return output;
    }
    template <class Spoil>
    void refuses(const char* what, Spoil spoil) {
        Arrays arrays = fine;
        spoil(arrays);
        refuses(what, arrays);
    }
};

}  // namespace

void refusals(Random& random) {
    constexpr int64_t kMost = INT64_MAX, kLeast = INT64_MIN;
    Scene scene(random), peaceful(random);
    int64_t vocabulary = scene.decoder.vocabulary, slots = scene.blocks * scene.decoder.block_size;
    int64_t positions = scene.fine.table_width * scene.decoder.block_size;
    for (Scene* each : {&scene, &peaceful}) {
        Output output(each->engine, 3);
        output.run(each->engine, each->fine.step());
    }
    for (size_t i : {size_t(0), size_t(37), size_t(70)}) {
        for (int64_t bad : {int64_t(-1), vocabulary, kMost, kLeast})
            scene.refuses("token", [&](Arrays& a) { a.tokens[i] = bad; });
        for (int64_t bad : {int64_t(-1), slots, kMost, kLeast})
            scene.refuses("slot", [&](Arrays& a) { a.slots[i] = bad; });
        for (int64_t bad : {int64_t(-1), positions, kMost, kLeast})
            scene.refuses("position", [&](Arrays& a) { a.positions[i] = bad; });
    }
    for (int32_t bad : {-1, static_cast<int32_t>(scene.blocks), INT32_MAX, INT32_MIN})
        for (size_t i : {size_t(0), static_cast<size_t>(37 / scene.decoder.block_size),
                         static_cast<size_t>(scene.fine.table_width)})
            scene.refuses("block", [&](Arrays& a) { a.tables[i] = bad; });
    // The last token of a row sees less than one before it, and the table ends with what the last one sees.
    scene.refuses("block of a token that is not the last", [&](Arrays& a) {
        std::swap(a.positions[0], a.positions[37]);
        std::fill(a.tables.begin() + 1, a.tables.begin() + a.table_width, INT32_MAX / 2);
    });
    for (std::vector<int64_t> bad : {std::vector<int64_t>{0, 71},
                                     {71, 0},
                                     {-1, 72},
                                     {38, 34},
                                     {38, 32},
                                     {1, kMost},
                                     {kMost, kMost},
                                     {kMost, kLeast},
                                     {kLeast, 38},
                                     {38},
                                     {38, 33, 1}})
        scene.refuses("lengths", [&](Arrays& a) {
            a.lengths = bad;
            a.tables.resize(bad.size() * static_cast<size_t>(a.table_width), 0);
        });
    for (int64_t bad : {int64_t(-1), int64_t(71), kMost, kLeast})
        for (size_t i : {size_t(0), size_t(2)}) scene.refuses("logits", [&](Arrays& a) { a.logits_at[i] = bad; });
    scene.refuses("logits in another order", [&](Arrays& a) { std::swap(a.logits_at[0], a.logits_at[2]); });
    scene.refuses("no rows", [&](Arrays& a) { a.lengths.clear(); });
    for (int64_t bad : {int64_t(9), int64_t(38), kMost, kLeast})
        scene.refuses("the last key that a token sees", [&](Arrays& a) {
            a.until = a.positions;
            a.until[10] = bad;
        });
    for (std::vector<int64_t> bad : {std::vector<int64_t>{-1}, {71}, {5, 5}, {6, 5}, {3, kMost}, {kLeast}})
        scene.refuses("tokens of images", [&](Arrays& a) { a.image_at = bad; });
    CHECK(same_bits(scene.next().logits.get(), peaceful.next().logits.get(), vocabulary),
          "refusals changed what follows them");

    Output output(scene.engine, 3);
    Program empty(1, "");
    check_throws<std::out_of_range>(
        [&] { empty.run(scene.fine.step(), {output.logits.get(), nullptr, 0, output.best.get()}); },
        "an empty program");
    check_throws<std::invalid_argument>([] { Program none(1, "no such set"); }, "an unknown instruction set");
}

}  // namespace inflight::testing
