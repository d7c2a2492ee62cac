/* What test_clients.py has every client do; the same in each language. scenario MODE FOLDER RING_SECONDS COMMAND... */
#define MOSSNANO_IMPLEMENTATION
#include "mossnano.h"

static _Atomic int fatal_errors;

static void say_error(void *context, const char *code, const char *message, bool fatal) {
    (void)context;
    printf("error %s %d %s\n", code, fatal, message);
    fflush(stdout);
    fatal_errors += fatal;
}

static uint8_t *load(const char *folder, const char *name, size_t *bytes) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    uint8_t *data = malloc(1 << 20);
    if (!file || !data) exit(3);
    *bytes = fread(data, 1, 1 << 20, file);
    fclose(file);
    return data;
}

static FILE *output(const char *folder, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (!file) exit(3);
    return file;
}

static size_t pull_into(mossnano *voice, FILE *file, size_t wanted) {
    int16_t pcm[2 * 1000];
    memset(pcm, 0x55, sizeof pcm);
    size_t samples = mossnano_pull(voice, pcm, wanted);
    fwrite(pcm, 4, samples, file);
    for (size_t i = samples * 2; i < wanted * 2; i++) if (pcm[i]) printf("no silence\n");
    if (samples < wanted) mossnano__sleep_ms(1);
    return samples;
}

static void play(mossnano *voice, const char *folder, const char *name) {
    FILE *file = output(folder, name);
    while (mossnano_is_speaking(voice)) pull_into(voice, file, 441);
    fclose(file);
}

static void streams(mossnano *voice, const char *folder) {
    size_t bytes, frame_bytes = (size_t)mossnano_get_format(voice).frame_bytes;
    uint8_t *packed = load(folder, "first.tokens", &bytes);
    mossnano_feed(voice, packed, bytes / frame_bytes);
    mossnano_finish(voice);
    play(voice, folder, "first.pcm");
    free(packed);

    packed = load(folder, "second.tokens", &bytes);
    mossnano_feed(voice, packed, bytes / frame_bytes);
    mossnano_finish(voice);
    FILE *file = output(folder, "second.pcm");
    for (size_t heard = 0; heard < 20000;) heard += pull_into(voice, file, 441);
    mossnano_cancel(voice);
    fclose(file);
    free(packed);

    size_t quantizers = (size_t)mossnano_get_format(voice).quantizers;
    uint16_t *codes = (uint16_t *)load(folder, "third.codes", &bytes); /* little-endian, as we are */
    mossnano_feed_codes(voice, codes, bytes / 2 / quantizers);
    mossnano_finish(voice);
    play(voice, folder, "third.pcm");
    codes[3] = (uint16_t)mossnano_get_format(voice).codebook_size;
    printf("bad codes %s\n", mossnano_feed_codes(voice, codes, 1) ? "taken" : "refused");
    free(codes);
}

static void dry(mossnano *voice, const char *folder) {
    size_t bytes;
    uint8_t *packed = load(folder, "first.tokens", &bytes);
    FILE *file = output(folder, "dry.pcm");
    size_t frame_samples = (size_t)mossnano_get_format(voice).frame_samples;
    pull_into(voice, file, 441); /* nothing was fed: silence, and no underrun */
    printf("underruns %llu\n", (unsigned long long)mossnano_underruns(voice));
    mossnano_feed(voice, packed, 4);
    for (size_t heard = 0; heard < 4 * frame_samples;) heard += pull_into(voice, file, 480);
    unsigned long long before = mossnano_underruns(voice);
    printf("silent %d\n", pull_into(voice, file, 480) == 0);
    printf("counted %llu\n", (unsigned long long)mossnano_underruns(voice) - before);
    mossnano_finish(voice);
    while (mossnano_is_speaking(voice)) pull_into(voice, file, 480);
    before = mossnano_underruns(voice);
    pull_into(voice, file, 480);
    printf("counted %llu\n", (unsigned long long)mossnano_underruns(voice) - before);
    fclose(file);
    free(packed);
}

static void dies(mossnano *voice, const char *folder) {
    uint8_t frame[64] = {0};
    mossnano_feed(voice, frame, 1);
    play(voice, folder, "dies.pcm");
    while (!fatal_errors) mossnano__sleep_ms(1);
    printf("fed %d\n", mossnano_feed(voice, frame, 1));
    printf("finished %d\n", mossnano_finish(voice));
}

int main(int count, char **words) {
    char error[2200];
    if (count < 5) return 2;
    mossnano_options options = {
        .command = (const char *const *)words + 4, .ring_seconds = strtod(words[3], NULL), .on_error = say_error,
        .fade_ms = -1};
    mossnano *voice = mossnano_start(&options, error, sizeof error);
    if (!voice) return printf("not started %s\n", error), 0;
    mossnano_format f = mossnano_get_format(voice);
    printf("format %d %d %d %d %d %d %d\n", f.sample_rate, f.channels, f.frame_samples, f.quantizers, f.codebook_size,
           f.frame_bytes, f.max_audio_bytes);
    if (!strcmp(words[1], "streams")) streams(voice, words[2]);
    if (!strcmp(words[1], "dry")) dry(voice, words[2]);
    if (!strcmp(words[1], "dies")) dies(voice, words[2]);
    mossnano_stop(voice);
    printf("stopped\n");
    return 0;
}
