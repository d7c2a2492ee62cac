/* example.c: a file of packed frames in, PCM on stdout, as an audio callback would get it.
 *
 *     gcc -std=c11 -Wall -Wextra -pthread example.c -o example
 *     ./example tokens.bin mossnano-stdio --weights demo > out.pcm
 */
#define MOSSNANO_IMPLEMENTATION
#include "mossnano.h"
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

static void say_error(void *context, const char *code, const char *message, bool fatal) {
    (void)context;
    fprintf(stderr, "%s%s: %s\n", fatal ? "fatal: " : "", code, message);
}

int main(int count, char **words) {
    FILE *tokens = count > 2 ? fopen(words[1], "rb") : NULL;
    if (!tokens) return fprintf(stderr, "usage: example TOKENS COMMAND...  (TOKENS: a file of packed frames)\n"), 2;

    char error[256];
    mossnano_options options = {.command = (const char *const *)words + 2, .on_error = say_error};
    options.fade_ms = -1; /* gaps are left out below, not heard */
    mossnano *voice = mossnano_start(&options, error, sizeof error);
    if (!voice) return fprintf(stderr, "%s\n", error), 1;

    uint8_t frame[4096];
    size_t frame_bytes = (size_t)mossnano_get_format(voice).frame_bytes;
    while (frame_bytes <= sizeof frame && fread(frame, frame_bytes, 1, tokens) == 1 && mossnano_feed(voice, frame, 1)) {}
    mossnano_finish(voice);
    fclose(tokens);

#ifdef _WIN32
    _setmode(_fileno(stdout), _O_BINARY); /* or each 0x0A in the sound would become two bytes */
#endif
    int16_t pcm[480 * 8]; /* what a sound card asks for: 10 ms of 48 kHz */
    size_t channels = (size_t)mossnano_get_format(voice).channels;
    while (channels <= 8 && mossnano_is_speaking(voice)) {
        size_t samples = mossnano_pull(voice, pcm, 480);
        fwrite(pcm, channels * sizeof *pcm, samples, stdout);
        if (samples < 480) mossnano__sleep_ms(1); /* a sound card would play the silence that is in `pcm` now */
    }
    mossnano_stop(voice);
    return 0;
}
