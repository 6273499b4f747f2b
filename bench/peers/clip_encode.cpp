// llama.cpp's vision tower, timed alone: `clip_encode FILE WIDTH HEIGHT THREADS` reads the vision part of a model from
// a GGUF file, says "ready", and for each line of its input encodes one picture of noise and prints the seconds.
//
// Against llama.cpp's own sources and libraries (bench/setup_cpu_peers.sh); bench/vision_cases.py compiles it.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "clip-impl.h"
#include "clip.h"

static void silent(ggml_log_level, const char*, void*) {}

int main(int argc, char** argv) {
    if (argc != 5) {
        std::fprintf(stderr, "clip_encode FILE WIDTH HEIGHT THREADS\n");
        return 2;
    }
    mtmd_log_set(silent, nullptr);
    clip_context_params settings = {};
    settings.use_gpu = false;
    settings.flash_attn_type = CLIP_FLASH_ATTN_TYPE_AUTO;
    settings.image_min_tokens = settings.image_max_tokens = -1;
    clip_ctx* context = clip_init(argv[1], settings).ctx_v;
    if (context == nullptr) {
        std::fprintf(stderr, "the file cannot be read\n");
        return 1;
    }
    const int width = std::atoi(argv[2]), height = std::atoi(argv[3]), threads = std::atoi(argv[4]);
    std::mt19937 generator(0);
    std::normal_distribution<float> noise;
    std::vector<float> pixels(size_t(width) * height * 3), rows;
    for (float& value : pixels) value = noise(generator);
    clip_image_f32 image;
    image.set_size({width, height}, false, false);
    image.cpy_buf(pixels);
    std::printf("ready %d\n", clip_n_output_tokens(context, &image));
    std::fflush(stdout);
    while (std::getchar() != EOF) {
        const auto begin = std::chrono::steady_clock::now();
        if (!clip_image_encode(context, threads, &image, rows)) return 1;
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        std::printf("%.6f\n", seconds.count());
        std::fflush(stdout);
    }
    clip_free(context);
    return 0;
}
