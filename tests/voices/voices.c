/* Does what stdin says with voices of one client, and answers each line with one. voices COMMAND... */
#define MOSSNANO_IMPLEMENTATION
#include "mossnano.h"

enum { VOICES = 64, SAMPLES = 4800 };
static mossnano_voice *voices[VOICES];
static _Atomic int errors;
static char last_error[64];

static void note_error(void *context, const char *code, const char *message, bool fatal) {
    (void)context, (void)message, (void)fatal;
    snprintf(last_error, sizeof last_error, "%s", code);
    errors++;
}

static void open_voice(mossnano *client, int number, const char *words) {
    char error[300];
    mossnano_voice_options options;
    memset(&options, 0, sizeof options);
    int mono;
    sscanf(words, "%lf %lf %lf %lf %d %d", &options.ring_seconds, &options.prebuffer_ms, &options.fade_ms, &options.gain,
           &mono, &options.priority);
    options.fade_ms = options.fade_ms > 0 ? options.fade_ms : -1;
    options.is_mono = mono;
    voices[number] = mossnano_open(client, &options, error, sizeof error);
    puts(voices[number] ? "opened" : error);
}

static bool feed(mossnano *client, mossnano_voice *voice, const char *path, bool are_codes) {
    static uint8_t data[1 << 22];
    FILE *file = fopen(path, "rb");
    if (!file) exit(3);
    size_t bytes = fread(data, 1, sizeof data, file);
    fclose(file);
    mossnano_format format = mossnano_get_format(client);
    if (are_codes) return mossnano_voice_feed_codes(voice, (uint16_t *)data, bytes / 2 / (size_t)format.quantizers);
    return mossnano_voice_feed(voice, data, bytes / (size_t)format.frame_bytes);
}

/* FOLDER NUMBER...: all that is real of several, in turn, until all are silent, into FOLDER/NUMBER.pcm. */
static void hear(const char *words) {
    FILE *files[VOICES] = {NULL};
    char path[4096];
    int16_t pcm[2 * 480];
    const char *numbers = strchr(words, ' ');
    for (char *end; *numbers && *numbers != '\n'; numbers = end) {
        long number = strtol(numbers, &end, 10);
        snprintf(path, sizeof path, "%.*s/%ld.pcm", (int)strcspn(words, " "), words, number);
        files[number] = fopen(path, "wb");
        if (!files[number]) exit(3);
    }
    for (bool is_any = true; is_any; mossnano__sleep_ms(1)) {
        is_any = false;
        for (int i = 0; i < VOICES; i++) {
            if (!files[i]) continue;
            is_any |= mossnano_voice_is_speaking(voices[i]);
            fwrite(pcm, 4, mossnano_voice_pull(voices[i], pcm, 480), files[i]);
        }
    }
    for (int i = 0; i < VOICES; i++) if (files[i]) fclose(files[i]);
    puts("heard");
}

static void pull(mossnano_voice *voice, size_t samples, size_t channels) {
    int16_t pcm[2 * SAMPLES];
    memset(pcm, 0x55, sizeof pcm);
    printf("%zu", mossnano_voice_pull(voice, pcm, samples));
    for (size_t i = 0; i < samples * channels; i++) printf(" %d", pcm[i]);
    puts("");
}

static void say_marks(mossnano_voice *voice) {
    mossnano_mark mark;
    while (mossnano_voice_take_mark(voice, &mark)) printf("%.*s@%lld ", (int)mark.bytes, mark.text, (long long)mark.sample);
    puts("");
}

int main(int count, char **words) {
    char error[2300], line[8192], verb[32], rest[8000];
    mossnano_options options = {.command = (const char *const *)words + 1, .on_error = note_error, .restart = 1};
    mossnano *client = mossnano_start(&options, error, sizeof error);
    (void)count;
    if (!client) return puts(error), 1;
    printf("%d %d\n", mossnano_max_streams(client), mossnano_pid(client));
    for (fflush(stdout); fgets(line, sizeof line, stdin); fflush(stdout)) {
        int number = 0;
        rest[0] = 0;
        sscanf(line, "%31s %d %7999[^\n]", verb, &number, rest);
        mossnano_voice *voice = voices[number];
        if (!strcmp(verb, "open")) open_voice(client, number, rest);
        if (!strcmp(verb, "feed")) printf("%d\n", feed(client, voice, rest, false));
        if (!strcmp(verb, "codes")) printf("%d\n", feed(client, voice, rest, true));
        if (!strcmp(verb, "mark")) printf("%d\n", mossnano_voice_mark(voice, rest, strlen(rest)));
        if (!strcmp(verb, "marks")) say_marks(voice);
        if (!strcmp(verb, "finish")) printf("%d\n", mossnano_voice_finish(voice));
        if (!strcmp(verb, "cancel")) printf("%lld\n", (long long)mossnano_voice_cancel(voice));
        if (!strcmp(verb, "pull")) pull(voice, (size_t)atoi(rest), 2);
        if (!strcmp(verb, "pull_mono")) pull(voice, (size_t)atoi(rest), 1);
        if (!strcmp(verb, "gain")) mossnano_voice_set_gain(voice, atof(rest)), puts("set");
        if (!strcmp(verb, "played")) printf("%lld\n", (long long)mossnano_voice_played(voice));
        if (!strcmp(verb, "underruns")) printf("%lld\n", (long long)mossnano_voice_underruns(voice));
        if (!strcmp(verb, "speaking")) printf("%d\n", mossnano_voice_is_speaking(voice));
        if (!strcmp(verb, "reason")) puts(mossnano_voice_reason(voice));
        if (!strcmp(verb, "close")) mossnano_voice_close(voice), voices[number] = NULL, puts("closed"); /* or it was */
        if (!strcmp(verb, "errors")) printf("%d %s\n", errors, last_error);
        if (!strcmp(verb, "ready")) printf("%d\n", mossnano_state(client) == MOSSNANO_READY);
        if (!strcmp(verb, "waiting")) printf("%lld\n", (long long)((voice->written - voice->taken) / voice->channels));
        if (!strcmp(verb, "hear")) hear(line + strlen("hear "));
    }
    mossnano_stop(client); /* and the voices that are left */
    puts("stopped");
    return 0;
}
