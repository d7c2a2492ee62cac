/* mossnano.h: a voice for a C program. Starts `mossnano-stdio`, feeds it codec tokens, hands out PCM.
 *
 * One header, C11 or C++11, no dependency. In exactly one source file, before every other #include:
 *
 *     #define MOSSNANO_IMPLEMENTATION
 *     #include "mossnano.h"
 *
 * Two threads of yours may use a client at the same time: one that controls (start, feed, finish, cancel, stop) and
 * one that calls mossnano_pull, which never locks, waits or allocates and so may be an audio callback. A third one, of
 * ours, reads all that the process says. When the ring is full it waits for room, and so does the process: then
 * some 4 MiB of tokens can still be fed (hours) before mossnano_feed waits too.
 *
 * POSIX: link with -pthread; tested on Linux. Windows: compiled once (zig cc), NOT RUN.
 * MSVC needs /std:c11 /experimental:c11atomics. Protocol version 1, see protocol.md.
 */
#ifndef MOSSNANO_H
#define MOSSNANO_H

#if defined MOSSNANO_IMPLEMENTATION && !defined _XOPEN_SOURCE
#define _XOPEN_SOURCE 700 /* -std=c11 hides POSIX, unless this comes before every system header */
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mossnano mossnano;

typedef struct {
    const char *const *command; /* the program, its arguments, NULL: {"mossnano-stdio", NULL}, looked up on the PATH */
    double ring_seconds;        /* PCM that may wait to be pulled; 0: 10 */
    double start_seconds;       /* how long loading the weights may take; 0: 60 */
    void (*on_error)(void *context, const char *code, const char *message, bool fatal); /* on our thread; or NULL */
    void *context;
} mossnano_options;

typedef struct { /* as the process says in its HANDSHAKE */
    int sample_rate, channels, frame_samples, quantizers, codebook_size, frame_bytes, max_audio_bytes;
} mossnano_format;

/* Returns when the process is ready; NULL and a text in `error` when it will not be. */
mossnano *mossnano_start(const mossnano_options *options, char *error, size_t error_bytes);
mossnano_format mossnano_get_format(const mossnano *client);

/* Adds frames to the stream and opens one where none is open: packed ones, frame_bytes each, or codes, `quantizers`
 * each. All four answer false when the process is gone (on_error said why), mossnano_feed_codes for bad codes too. */
bool mossnano_feed(mossnano *client, const void *packed, size_t frames);
bool mossnano_feed_codes(mossnano *client, const uint16_t *codes, size_t frames);
bool mossnano_finish(mossnano *client); /* the stream is complete */
bool mossnano_cancel(mossnano *client); /* be silent, now: drops whatever was fed, and all that waits to be pulled */

/* Fills `out` with `samples` samples of all channels, with silence where there are none. Returns how many are real. */
size_t mossnano_pull(mossnano *client, int16_t *out, size_t samples);
bool mossnano_is_speaking(mossnano *client);      /* is something to be pulled, now or later? */
uint64_t mossnano_underruns(mossnano *client);    /* pulls that found the ring dry in the middle of a stream */
void mossnano_stop(mossnano *client);             /* ends the process; nothing of it is left. No pull may be running */

#ifdef __cplusplus
}
#endif
#endif

#ifdef MOSSNANO_IMPLEMENTATION
#ifndef _WIN32
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#else
#include <windows.h>
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __cplusplus /* the same words for what both have under other names */
#include <atomic>
typedef std::atomic<uint64_t> mossnano__atomic_u64;
typedef std::atomic<bool> mossnano__atomic_bool;
typedef std::atomic<int> mossnano__atomic_int;
#else
#include <stdatomic.h>
typedef _Atomic uint64_t mossnano__atomic_u64;
typedef atomic_bool mossnano__atomic_bool;
typedef atomic_int mossnano__atomic_int;
#endif

enum { MOSSNANO_HANDSHAKE = 0, MOSSNANO_AUDIO = 1, MOSSNANO_TOKENS = 4, MOSSNANO_ERROR = 5, MOSSNANO_END = 7, MOSSNANO_CANCEL = 8 };
enum { MOSSNANO_LONGEST = 1 << 20 };   /* no message of the process is longer */
enum { MOSSNANO_PIECE = 1 << 16 };     /* of what is fed in one message: CANCEL must not wait behind a long one */
enum { MOSSNANO_STOP_MS = 2000 };      /* how long the process may take to end by itself */
enum { MOSSNANO_STARTING, MOSSNANO_READY, MOSSNANO_GONE };

struct mossnano {
#ifdef _WIN32
    HANDLE process, job, input, output, reader;
#else
    pid_t process;
    int input, output;
    pthread_t reader;
#endif
    mossnano_options options;
    mossnano_format format;
    bool stream_is_open;           /* the controlling thread's */
    bool fatal_was_said;           /* the reader's, as is `message` */
    char fault[2100];              /* why there was no HANDSHAKE */
    uint8_t *message;
    int16_t *ring;                 /* values, not samples; indices only grow, `% capacity` says where they are */
    uint64_t capacity;
    mossnano__atomic_u64 written, taken, drop_before; /* moved by: reader, puller, reader */
    mossnano__atomic_u64 opened, ended;               /* streams */
    mossnano__atomic_u64 cancels, cancels_answered;
    mossnano__atomic_u64 underruns;
    mossnano__atomic_bool is_sounding;       /* PCM of a stream came, its END did not */
    mossnano__atomic_bool is_stopping;
    mossnano__atomic_int state;
};

/* --- what differs between systems ------------------------------------------------------------------------------ */

static int mossnano__reader_main(mossnano *client);

#ifdef _WIN32
static DWORD WINAPI mossnano__thread(void *client) { return (DWORD)mossnano__reader_main((mossnano *)client); }
static bool mossnano__start_thread(mossnano *c) { return (c->reader = CreateThread(NULL, 0, mossnano__thread, c, 0, NULL)) != NULL; }
static void mossnano__join(mossnano *c) { WaitForSingleObject(c->reader, INFINITE); CloseHandle(c->reader); }
static void mossnano__sleep_ms(int ms) { Sleep((DWORD)ms); }
static void mossnano__close_input(mossnano *c) { CloseHandle(c->input); }
static void mossnano__kill(mossnano *c) { TerminateJobObject(c->job, 1); }
static void mossnano__release(mossnano *c) { CloseHandle(c->output); CloseHandle(c->process); CloseHandle(c->job); }
static void mossnano__never_block(mossnano *c) { DWORD mode = PIPE_NOWAIT; SetNamedPipeHandleState(c->input, &mode, NULL, NULL); }

static size_t mossnano__read_some(mossnano *c, uint8_t *out, size_t bytes) {
    DWORD got = 0;
    return ReadFile(c->output, out, (DWORD)bytes, &got, NULL) ? got : 0;
}

static bool mossnano__write(mossnano *c, const uint8_t *data, size_t bytes) {
    DWORD put = 0;
    for (; bytes; data += put, bytes -= put)
        if (!WriteFile(c->input, data, (DWORD)bytes, &put, NULL) || !put) return false;
    return true;
}

static int mossnano__exit_status(mossnano *c) {
    DWORD status = 0;
    WaitForSingleObject(c->process, INFINITE);
    GetExitCodeProcess(c->process, &status);
    return (int)status;
}

static char *mossnano__quote(char *out, const char *word) { /* as the C runtime of the process takes it apart again */
    size_t slashes = 0;
    for (*out++ = '"'; *word; *out++ = *word++) {
        if (*word == '"') for (*out++ = '\\'; slashes; slashes--) *out++ = '\\';
        slashes = *word == '\\' ? slashes + 1 : 0;
    }
    while (slashes--) *out++ = '\\';
    *out++ = '"';
    return out;
}

static bool mossnano__spawn(mossnano *c, const char *const *command, char *error, size_t error_bytes) {
    size_t most = 1;
    for (const char *const *word = command; *word; word++) most += 2 * strlen(*word) + 3;
    char *line = (char *)malloc(most), *end = line;
    WCHAR *wide = (WCHAR *)malloc(most * sizeof *wide);
    for (const char *const *word = command; *word && line; word++) { end = mossnano__quote(end, *word); *end++ = ' '; }
    if (line) *end = 0;
    STARTUPINFOW start;
    memset(&start, 0, sizeof start);
    start.cb = sizeof start, start.dwFlags = STARTF_USESTDHANDLES;
    SECURITY_ATTRIBUTES inherited = {sizeof inherited, NULL, TRUE};
    PROCESS_INFORMATION made;
    HANDLE ends[4] = {NULL, NULL, NULL, NULL};
    bool ok = line && wide && MultiByteToWideChar(CP_UTF8, 0, line, -1, wide, (int)most) &&
              CreatePipe(&ends[0], &ends[1], &inherited, 0) && CreatePipe(&ends[2], &ends[3], &inherited, 0) &&
              SetHandleInformation(ends[1], HANDLE_FLAG_INHERIT, 0) && SetHandleInformation(ends[2], HANDLE_FLAG_INHERIT, 0);
    start.hStdInput = ends[0], start.hStdOutput = ends[3], start.hStdError = GetStdHandle(STD_ERROR_HANDLE);
    c->input = ends[1], c->output = ends[2];
    ok = ok && CreateProcessW(NULL, wide, NULL, NULL, TRUE, CREATE_NO_WINDOW | CREATE_SUSPENDED, NULL, NULL, &start, &made);
    if (!ok) snprintf(error, error_bytes, "%s cannot be started (Windows error %lu): is it installed and on the PATH?", command[0], GetLastError());
    for (int i = 0; i < 4; i++) if (ends[i] && (!ok || i % 3 == 0)) CloseHandle(ends[i]);
    free(line), free(wide);
    if (!ok) return false;
    JOBOBJECT_EXTENDED_LIMIT_INFORMATION limit; /* the launcher that pip makes has a child: end both, also if we crash */
    memset(&limit, 0, sizeof limit);
    limit.BasicLimitInformation.LimitFlags = JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE;
    c->process = made.hProcess, c->job = CreateJobObjectW(NULL, NULL);
    SetInformationJobObject(c->job, JobObjectExtendedLimitInformation, &limit, sizeof limit);
    AssignProcessToJobObject(c->job, made.hProcess);
    ResumeThread(made.hThread);
    CloseHandle(made.hThread);
    return true;
}
#else
extern char **environ;

static void *mossnano__thread(void *client) { mossnano__reader_main((mossnano *)client); return NULL; }
static bool mossnano__start_thread(mossnano *c) { return pthread_create(&c->reader, NULL, mossnano__thread, c) == 0; }
static void mossnano__join(mossnano *c) { pthread_join(c->reader, NULL); }
static void mossnano__sleep_ms(int ms) { struct timespec pause = {0, ms * 1000000L}; nanosleep(&pause, NULL); }
static void mossnano__close_input(mossnano *c) { close(c->input); }
static void mossnano__kill(mossnano *c) { kill(-c->process, SIGKILL); } /* its group: a wrapper may have children */
static void mossnano__release(mossnano *c) { close(c->output); while (waitpid(c->process, NULL, 0) < 0 && errno == EINTR) {} }
static void mossnano__never_block(mossnano *c) { fcntl(c->input, F_SETFL, O_NONBLOCK); }

static size_t mossnano__read_some(mossnano *c, uint8_t *out, size_t bytes) {
    ssize_t got;
    do got = read(c->output, out, bytes); while (got < 0 && errno == EINTR);
    return got > 0 ? (size_t)got : 0;
}

static bool mossnano__write(mossnano *c, const uint8_t *data, size_t bytes) {
    sigset_t broken_pipe, before, pending; /* a process that died must not take yours along with a SIGPIPE */
    sigemptyset(&broken_pipe), sigaddset(&broken_pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &broken_pipe, &before);
    while (bytes) {
        ssize_t put = write(c->input, data, bytes);
        if (put > 0) data += put, bytes -= (size_t)put;
        else if (errno != EINTR) break;
    }
    int number = errno;
    sigpending(&pending);
    if (bytes && number == EPIPE && sigismember(&pending, SIGPIPE) && !sigismember(&before, SIGPIPE)) sigwait(&broken_pipe, &number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return bytes == 0;
}

static int mossnano__exit_status(mossnano *c) { /* leaves the zombie, so that nobody else gets its number before we stop */
    siginfo_t info;
    memset(&info, 0, sizeof info);
    while (waitid(P_PID, (id_t)c->process, &info, WEXITED | WNOWAIT) < 0 && errno == EINTR) {}
    return info.si_code == CLD_EXITED ? info.si_status : -info.si_status;
}

/* Both ends are 3 or above, also where the host has closed 0, 1 or 2: the child's own 0, 1 and 2 are no pipe by chance.
 * Close-on-exec: other children must not hold them open. */
static bool mossnano__pipe(int *ends) {
    int low[2];
    if (pipe(low) < 0) return false;
    for (int i = 0; i < 2; i++) ends[i] = fcntl(low[i], F_DUPFD_CLOEXEC, 3);
    int number = errno;
    close(low[0]), close(low[1]);
    errno = number;
    return ends[0] >= 0 && ends[1] >= 0;
}

static bool mossnano__spawn(mossnano *c, const char *const *command, char *error, size_t error_bytes) {
    int ends[4] = {-1, -1, -1, -1};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_t attributes; /* a group of its own: we end it, Ctrl-C does not. And no signal that the host blocks */
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    sigset_t none, all;
    sigemptyset(&none), posix_spawnattr_setsigmask(&attributes, &none);
    sigfillset(&all), sigdelset(&all, SIGKILL), sigdelset(&all, SIGSTOP), posix_spawnattr_setsigdefault(&attributes, &all);
    int number = mossnano__pipe(ends) && mossnano__pipe(ends + 2) ? 0 : errno;
    if (!number) posix_spawn_file_actions_adddup2(&actions, ends[0], 0);
    if (!number) posix_spawn_file_actions_adddup2(&actions, ends[3], 1);
    bool has_stderr = fcntl(2, F_GETFD) >= 0; /* without one, the first file that the child opens would be its stderr */
    if (!has_stderr) posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
    if (!number) number = posix_spawnp(&c->process, command[0], &actions, &attributes, (char *const *)command, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    c->input = ends[1], c->output = ends[2];
    for (int i = 0; i < 4; i++) if (ends[i] >= 0 && (number || i % 3 == 0)) close(ends[i]);
    if (number) snprintf(error, error_bytes, "%s cannot be started (%s): is it installed and on the PATH?", command[0], strerror(number));
    return !number;
}
#endif

/* --- JSON, as far as it is needed: unknown keys are passed over ------------------------------------------------- */

static const char *mossnano__skip_text(const char *at) { /* from behind the opening quote to the closing one */
    while (*at && *at != '"') at += at[0] == '\\' && at[1] ? 2 : 1;
    return at;
}

static const char *mossnano__find(const char *json, const char *key) { /* the value of a key of the outermost object, or "" */
    int depth = 0;
    for (const char *at = json; *at; at++) {
        depth += (*at == '{' || *at == '[') - (*at == '}' || *at == ']');
        if (*at != '"') continue;
        const char *text = at + 1;
        at = mossnano__skip_text(text);
        if (!*at) break;
        size_t after = 1 + strspn(at + 1, " \t\r\n"); /* only a key has a colon behind it */
        bool is_it = depth == 1 && at[after] == ':' && strlen(key) == (size_t)(at - text) && !memcmp(key, text, (size_t)(at - text));
        if (is_it) return at + after + 1 + strspn(at + after + 1, " \t\r\n");
    }
    return "";
}

static int mossnano__number(const char *json, const char *key) { return (int)strtol(mossnano__find(json, key), NULL, 10); }
static bool mossnano__is_true(const char *json, const char *key) { return !strncmp(mossnano__find(json, key), "true", 4); }

static void mossnano__text(const char *json, const char *key, char *out, size_t bytes) { /* UTF-8, cut to fit */
    const char *at = mossnano__find(json, key);
    char *last = out + bytes - 4;
    for (at += *at == '"'; *at && *at != '"' && out < last; at++) {
        if (*at != '\\') { *out++ = *at; continue; }
        if (*++at == 'u' && strlen(at) > 4) {
            char digits[] = {at[1], at[2], at[3], at[4], 0};
            unsigned long code = strtoul(digits, NULL, 16);
            at += 4;
            if (code >= 0xd800 && code < 0xe000) code = '?'; /* half of a rare character */
            if (code >= 0x800) *out++ = (char)(0xe0 | code >> 12);
            if (code >= 0x80) *out++ = (char)(code >= 0x800 ? 0x80 | (code >> 6 & 0x3f) : 0xc0 | code >> 6);
            *out++ = (char)(code >= 0x80 ? 0x80 | (code & 0x3f) : code);
        } else *out++ = *at == 'n' || *at == 't' || *at == 'r' ? ' ' : *at;
    }
    *out = 0;
}

/* --- the reader ------------------------------------------------------------------------------------------------- */

static bool mossnano__read_all(mossnano *c, uint8_t *out, size_t bytes) {
    for (size_t got; bytes; out += got, bytes -= got)
        if (!(got = mossnano__read_some(c, out, bytes))) return false;
    return true;
}

static void mossnano__say(mossnano *c, const char *code, const char *text, bool fatal) {
    if (c->is_stopping) return;
    if (c->state == MOSSNANO_STARTING) snprintf(c->fault, sizeof c->fault, "%s (%s)", text, code);
    else if (c->options.on_error) c->options.on_error(c->options.context, code, text, fatal);
    c->fatal_was_said |= fatal;
}

static bool mossnano__shake_hands(mossnano *c, const char *json) {
    mossnano_format *f = &c->format;
    const char *keys[] = {"sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes", "max_audio_bytes"};
    int *numbers[] = {&f->sample_rate, &f->channels, &f->frame_samples, &f->quantizers, &f->codebook_size, &f->frame_bytes, &f->max_audio_bytes};
    bool ok = mossnano__number(json, "protocol") == 1 && !strncmp(mossnano__find(json, "direction"), "\"decode\"", 8);
    for (int i = 0; i < 7; i++) ok &= (*numbers[i] = mossnano__number(json, keys[i])) > 0;
    if (!ok) return mossnano__say(c, "handshake", "this is no decoder of protocol 1: update mossnano.h, or drop --encode", true), false;
    double seconds = c->options.ring_seconds > 0 ? c->options.ring_seconds : 10;
    c->capacity = (uint64_t)(seconds * f->sample_rate) * (uint64_t)f->channels + (uint64_t)f->max_audio_bytes / 2;
    c->ring = (int16_t *)malloc(c->capacity * sizeof *c->ring);
    if (!c->ring) return mossnano__say(c, "out_of_memory", "no memory for the ring: lower ring_seconds", true), false;
    c->state = MOSSNANO_READY;
    return true;
}

static void mossnano__push(mossnano *c, const uint8_t *pcm, size_t values) {
    for (size_t i = 0; i < values && c->cancels == c->cancels_answered && !c->is_stopping;) {
        uint64_t at = c->written, room = c->capacity - (at - c->taken);
        if (!room) { mossnano__sleep_ms(2); continue; } /* asleep, not signalled: the puller must not touch a lock */
        uint64_t end = at + (room < values - i ? room : values - i);
        for (; at < end; at++, i++) c->ring[at % c->capacity] = (int16_t)(pcm[2 * i] | pcm[2 * i + 1] << 8);
        c->written = end;
        c->is_sounding = true;
    }
}

static void mossnano__end(mossnano *c, const char *json) {
    c->is_sounding = false;
    if (!mossnano__is_true(json, "cancelled")) { c->ended++; return; }
    char echo[32]; /* our CANCEL carried how many streams were open by then: all of those are over */
    mossnano__text(json, "echo", echo, sizeof echo);
    c->ended = strtoull(echo, NULL, 10);
    c->drop_before = (uint64_t)c->written;
    c->cancels_answered++;
}

static bool mossnano__take(mossnano *c, int kind, size_t bytes) {
    const char *json = (const char *)c->message; /* ends with a 0 */
    char code[64], text[2048];
    if (c->state == MOSSNANO_STARTING && kind == MOSSNANO_HANDSHAKE) return mossnano__shake_hands(c, json);
    if (kind == MOSSNANO_AUDIO && c->state == MOSSNANO_READY) mossnano__push(c, c->message, bytes / 2);
    if (kind == MOSSNANO_END) mossnano__end(c, json);
    if (kind == MOSSNANO_ERROR) {
        mossnano__text(json, "code", code, sizeof code);
        mossnano__text(json, "message", text, sizeof text);
        mossnano__say(c, code, text, mossnano__is_true(json, "fatal"));
    }
    return true;
}

static int mossnano__reader_main(mossnano *c) {
    uint8_t head[5];
    char text[120];
    while (mossnano__read_all(c, head, sizeof head)) {
        uint32_t length = head[0] | (uint32_t)head[1] << 8 | (uint32_t)head[2] << 16 | (uint32_t)head[3] << 24;
        if (length < 1 || length > MOSSNANO_LONGEST) {
            mossnano__say(c, "framing_lost", "the program does not speak the protocol: does something print to its stdout?", true);
            mossnano__kill(c);
            break;
        }
        if (!mossnano__read_all(c, c->message, length - 1)) break;
        c->message[length - 1] = 0;
        if (!mossnano__take(c, head[4], length - 1)) { mossnano__kill(c); break; }
    }
    snprintf(text, sizeof text, "the process ended by itself with status %d: its stderr says more", mossnano__exit_status(c));
    if (!c->fatal_was_said) mossnano__say(c, "process_ended", text, true);
    c->is_sounding = false;
    c->state = MOSSNANO_GONE;
    return 0;
}

/* --- what you call ---------------------------------------------------------------------------------------------- */

mossnano *mossnano_start(const mossnano_options *options, char *error, size_t error_bytes) {
    mossnano *c = (mossnano *)calloc(1, sizeof *c);
    if (c) c->message = (uint8_t *)malloc(MOSSNANO_LONGEST);
    if (!c || !c->message || !options->command || !options->command[0]) {
        snprintf(error, error_bytes, "options.command is empty, or there is no memory");
        free(c ? c->message : NULL), free(c);
        return NULL;
    }
    c->options = *options;
    if (!mossnano__spawn(c, options->command, error, error_bytes)) {
        free(c->message), free(c);
        return NULL;
    }
    if (!mossnano__start_thread(c)) {
        snprintf(error, error_bytes, "no thread to be had");
        mossnano__kill(c), mossnano__close_input(c), mossnano__release(c), free(c->message), free(c);
        return NULL;
    }
    double left_ms = 1000 * (options->start_seconds > 0 ? options->start_seconds : 60);
    for (; c->state == MOSSNANO_STARTING && left_ms > 0; left_ms -= 2) mossnano__sleep_ms(2);
    if (c->state == MOSSNANO_READY || c->ring) return c; /* one that is gone already says so when it is fed */
    bool is_late = c->state == MOSSNANO_STARTING;
    if (is_late) snprintf(error, error_bytes, "no HANDSHAKE in time: allow more start_seconds, or look at its stderr");
    else snprintf(error, error_bytes, "%s", c->fault);
    mossnano_stop(c);
    return NULL;
}

mossnano_format mossnano_get_format(const mossnano *client) { return client->format; }

static bool mossnano__send(mossnano *c, int kind, const void *payload, size_t bytes) {
    uint32_t length = (uint32_t)bytes + 1;
    uint8_t head[] = {(uint8_t)length, (uint8_t)(length >> 8), (uint8_t)(length >> 16), (uint8_t)(length >> 24), (uint8_t)kind};
    return c->state == MOSSNANO_READY && mossnano__write(c, head, sizeof head) && mossnano__write(c, (const uint8_t *)payload, bytes);
}

bool mossnano_feed(mossnano *c, const void *packed, size_t frames) {
    size_t frame_bytes = (size_t)c->format.frame_bytes, most = MOSSNANO_PIECE > frame_bytes ? MOSSNANO_PIECE / frame_bytes : 1;
    if (!c->stream_is_open) c->opened++;
    c->stream_is_open = true;
    const uint8_t *at = (const uint8_t *)packed;
    do { /* once for no frames as well: an empty TOKENS too opens a stream, for its END */
        size_t piece = frames < most ? frames : most;
        if (!mossnano__send(c, MOSSNANO_TOKENS, at, piece * frame_bytes)) return false;
        frames -= piece;
        at += piece ? piece * frame_bytes : 0;
    } while (frames);
    return true;
}

bool mossnano_feed_codes(mossnano *c, const uint16_t *codes, size_t frames) {
    size_t quantizers = (size_t)c->format.quantizers, frame_bytes = (size_t)c->format.frame_bytes, bits = 0;
    while (1 << bits < c->format.codebook_size) bits++;
    uint8_t *packed = (uint8_t *)calloc(frames + 1, frame_bytes);
    bool ok = packed != NULL;
    for (size_t i = 0; ok && i < frames * quantizers; i++) {
        ok = codes[i] < c->format.codebook_size;
        for (size_t bit = 0; bit < bits; bit++) {
            size_t at = i % quantizers * bits + bit; /* least significant bit first; each frame starts at a byte */
            packed[i / quantizers * frame_bytes + at / 8] |= (uint8_t)((codes[i] >> bit & 1) << at % 8);
        }
    }
    ok = ok && mossnano_feed(c, packed, frames);
    free(packed);
    return ok;
}

bool mossnano_finish(mossnano *c) {
    if (!c->stream_is_open) return c->state == MOSSNANO_READY;
    c->stream_is_open = false;
    return mossnano__send(c, MOSSNANO_END, NULL, 0);
}

bool mossnano_cancel(mossnano *c) {
    char opened[32];
    int bytes = snprintf(opened, sizeof opened, "%llu", (unsigned long long)c->opened);
    c->stream_is_open = false;
    c->cancels++; /* from here on the puller is silent and the reader drops, until as many ENDs have come back */
    return mossnano__send(c, MOSSNANO_CANCEL, opened, (size_t)bytes);
}

size_t mossnano_pull(mossnano *c, int16_t *out, size_t samples) {
    bool was_sounding = c->is_sounding; /* asked before the ring is looked at: what it told of is in there */
    bool is_cancelled = c->cancels != c->cancels_answered;
    uint64_t end = c->written, at = c->taken, wanted = samples * (uint64_t)c->format.channels;
    uint64_t drop_before = is_cancelled ? end : (uint64_t)c->drop_before;
    if (at < drop_before) at = drop_before;
    if (end < at) end = at;
    uint64_t values = end - at < wanted ? end - at : wanted;
    values -= values % (uint64_t)c->format.channels;
    for (uint64_t i = 0; i < values; i++) out[i] = c->ring[(at + i) % c->capacity];
    memset(out + values, 0, (size_t)(wanted - values) * sizeof *out);
    c->taken = at + values; /* only now: until here the reader must not write over it */
    if (values < wanted && was_sounding && c->is_sounding && !is_cancelled) c->underruns++;
    return (size_t)values / (size_t)c->format.channels;
}

bool mossnano_is_speaking(mossnano *c) {
    bool more_comes = c->state == MOSSNANO_READY && c->ended < c->opened; /* asked first: what came by then is in the ring */
    return more_comes || (c->taken < c->written && c->drop_before < c->written && c->cancels == c->cancels_answered);
}

uint64_t mossnano_underruns(mossnano *c) { return c->underruns; }

void mossnano_stop(mossnano *c) {
    if (!c) return;
    mossnano__never_block(c); /* not even for a process that hangs */
    c->is_stopping = true;
    mossnano_cancel(c);
    mossnano__close_input(c); /* which it takes as the end */
    for (int ms = 0; c->state != MOSSNANO_GONE && ms < MOSSNANO_STOP_MS; ms += 2) mossnano__sleep_ms(2);
    if (c->state != MOSSNANO_GONE) mossnano__kill(c);
    mossnano__join(c);
    mossnano__release(c);
    free(c->ring), free(c->message), free(c);
}
#endif
