// Checks the kernels of every instruction set that this machine has against plain loops in double precision, and that a
// result depends on nothing but its own inputs, to the bit. `kernels_test [seed] [tests]` repeats what failed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>

#include "program.h"
#include "tests.h"

using namespace inflight;
using namespace inflight::testing;

namespace {

struct Test {
    std::string name;
    std::function<void(Random&)> run;
};

}  // namespace

int main(int count, char** words) {
    uint64_t seed = count > 1 ? std::strtoull(words[1], nullptr, 0) : 20250117;
    std::vector<std::string> only(words + std::min(count, 2), words + count);
    std::vector<Test> tests = {{"sizes", sizes}, {"pages", pages}, {"pools", pools}, {"refusals", refusals}};
    for (const std::string& name : available()) {
        const Kernels* kernels = choose(name);
        if (kernels->name != name) continue;  // left out of this build
        auto of_set = [&](const char* what, void (*run)(const Kernels&, Random&)) {
            tests.push_back({what + ("." + name), [=](Random& random) { run(*kernels, random); }});
        };
        of_set("products", products);
        of_set("splits", splits);
        of_set("rows", rows);
        of_set("attention", attention);
        of_set("programs", programs);
        of_set("samplers", samplers);
        of_set("towers", towers);
        of_set("adapters", adapters);
    }
    int failed = 0;
    for (const Test& test : tests) {
        auto named = [&](const std::string& part) { return test.name.find(part) != std::string::npos; };
        if (!only.empty() && std::none_of(only.begin(), only.end(), named)) continue;
        auto begin = std::chrono::steady_clock::now();
        Random random(seed);
        try {
            test.run(random);
        } catch (const std::exception& error) {
            std::printf("%s FAILED with seed %llu: %s\n", test.name.c_str(), static_cast<unsigned long long>(seed),
                        error.what());
            failed++;
            continue;
        }
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        std::printf("%s passed in %.1f s\n", test.name.c_str(), seconds);
        std::fflush(stdout);
    }
    return failed ? 1 : 0;
}
