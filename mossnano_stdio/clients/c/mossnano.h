/* mossnano.h: a voice for a C program. Starts `mossnano-stdio`, feeds it codec tokens, hands out PCM.
 *
 * One header, C11 or C++11, no dependency. In exactly one source file, before every other #include:
 *
 *     #define MOSSNANO_IMPLEMENTATION
 *     #include "mossnano.h"
 *
 * Two threads of yours may use a client at the same time: one that controls (start, feed, finish, cancel, stop) and
 * one that calls mossnano_pull, which never locks, waits or allocates and so may be an audio callback. Feed, finish and
 * cancel never wait for the process, not even for one that hangs: a thread of ours writes, and up to 4 MiB (hours) may
 * wait for it. A feed beyond that is refused whole: it answers false, and on_error is told `queue_full`. Another thread
 * of ours reads all that the process says. When the ring is full it waits for room, and so does the process.
 *
 * Where nobody wants to wait for the weights, mossnano_launch gives a client at once: ask its mossnano_state.
 * With restart = N a process that crashes is started again, up to N times in a row (a stream that comes to its end ends
 * the row): what was fed until then is lost, and on_error and on_lost are told. mossnano_played says how much was heard
 * of which stream, for barge-in; mossnano_stream is the one that feed opened last. on_log gets the lines of the process'
 * stderr.
 *
 * What is cut off, by cancel or by an underrun, fades out over fade_ms, and what follows fades in: after a cancel, pull
 * on. With prebuffer_ms a stream sounds once so much of it waits, or all of it, and so again after an underrun: fed in
 * real time, with jitter, 100 to 200 are enough.
 *
 * Many voices of one process, at once: mossnano_open gives one for each utterance, with a ring and controls of its own.
 * The process decodes ahead only what a voice's ring has room for, so one that nobody pulls stops none of the others,
 * but for the stream of the client itself, which has no such limit: pull it, or feed voices alone.
 *
 * POSIX: link with -pthread; tested on Linux. Windows: mingw, run under wine 8. macOS: compiled once (zig cc), NOT RUN.
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
    double fade_ms;             /* out where a CANCEL or an underrun cuts a stream, in where it goes on; 0: 5. Below 0:
                                   no fade, every sample as it came, and a click */
    double prebuffer_ms;        /* of a stream are gathered before it is heard, and again after an underrun; 0: nothing */
    void (*on_error)(void *context, const char *code, const char *message, bool fatal); /* on our thread, but for
                                  queue_full, which is said in the feed that is refused; or NULL */
    void *context;              /* that the callbacks are given */
    void (*on_log)(void *context, const char *line); /* on our thread: the lines of the process' stderr, which otherwise
                                                        go to yours. Beyond 4 KiB one comes in pieces */
    void (*on_lost)(void *context, int64_t first, int64_t last); /* on our thread: the streams, by number, that were fed
                                                                    to a process that crashed and will not end */
    int restart;                /* how many times in a row a process that crashed is started again */
} mossnano_options;

typedef struct { /* as the process says in its HANDSHAKE */
    int sample_rate, channels, frame_samples, quantizers, codebook_size, frame_bytes, max_audio_bytes;
} mossnano_format;

typedef struct {
    int64_t stream;  /* the one that was pulled last, from 0; -1 before the first */
    int64_t samples; /* of it that were given out; what fades out counts for nothing */
} mossnano_position;

typedef struct mossnano_voice mossnano_voice;

typedef struct {
    double ring_seconds;  /* PCM that the process may send ahead; 0: 2. At least prebuffer_ms and one chunk */
    double fade_ms;       /* as in mossnano_options, and so is the next */
    double prebuffer_ms;
    double gain;          /* a factor, 0 to 100; 0 is taken as 1: see mossnano_voice_set_gain */
    bool is_mono;         /* pull gives one value for each sample, the mean of all channels */
    int priority;         /* who goes first where there is too much to do: from 3 to -4, the last */
} mossnano_voice_options;

typedef struct { /* of a stream, where its sample of that number has been pulled */
    int64_t sample;
    size_t bytes;
    char text[1001]; /* ends with a 0 */
} mossnano_mark;

/* Starting: also while a process that crashed is started again. */
enum mossnano_state { MOSSNANO_STARTING, MOSSNANO_READY, MOSSNANO_FAILED };

/* Returns when the process is ready; NULL and a text in `error` when it will not be. */
mossnano *mossnano_start(const mossnano_options *options, char *error, size_t error_bytes);

/* The same at once, whether or not there is such a program: a client whose state is MOSSNANO_STARTING. on_error is told
 * what goes wrong meanwhile, too. Until it is ready, feed, finish and cancel answer false, and pull gives nothing: it
 * does not even know the channels of `out` yet. NULL: the options are bad, or there is no memory. */
mossnano *mossnano_launch(const mossnano_options *options, char *error, size_t error_bytes);
enum mossnano_state mossnano_state(const mossnano *client);
const char *mossnano_reason(const mossnano *client); /* why it has failed; "" before */

int mossnano_pid(const mossnano *client);            /* 0: there is no process now */
int mossnano_restarts(const mossnano *client);

/* Zero, and "", until the client is ready. */
mossnano_format mossnano_get_format(const mossnano *client);
const char *mossnano_version(const mossnano *client);   /* of the program */
bool mossnano_is_demo(const mossnano *client);          /* the built-in demo, no real codec */
const char *mossnano_handshake(const mossnano *client); /* all that the process said, as JSON */

/* Adds frames to the stream and opens one where none is open: packed ones, frame_bytes each, or codes, `quantizers`
 * each. All four answer false unless the client is ready (on_error said why), mossnano_feed_codes for bad codes too. */
bool mossnano_feed(mossnano *client, const void *packed, size_t frames);
bool mossnano_feed_codes(mossnano *client, const uint16_t *codes, size_t frames);
bool mossnano_finish(mossnano *client); /* the stream is complete */
bool mossnano_cancel(mossnano *client); /* be silent, now: drops whatever was fed, and all that waits to be pulled */

/* Fills `out` with `samples` samples of all channels: with sound, a fade-out where it breaks off, and silence. Returns
 * how many are real: a fade-out is not. Before the client is ready that is none, and `out` is left alone. */
size_t mossnano_pull(mossnano *client, int16_t *out, size_t samples);
bool mossnano_is_speaking(mossnano *client);      /* is something to be pulled, now or later? */
int64_t mossnano_stream(const mossnano *client);  /* the one that feed opened last, from 0; -1 before the first */
mossnano_position mossnano_played(const mossnano *client); /* how much was heard of which, less what the sound card holds */
uint64_t mossnano_underruns(mossnano *client);    /* pulls that found the ring dry in the middle of a stream */
void mossnano_stop(mossnano *client);             /* ends the process, and frees all voices; nothing is left. No pull
                                                     may be running, and no callback of ours may call this */

/* A voice is one utterance. All of these may be called from any thread, but for pull: by one at a time, and none while
 * the voice is closed. Feed and mark answer false where it is over or finished, and where too much waits: 768 KiB of
 * frames that the process did not decode, 128 marks that nobody took. Then on_error is told `queue_full`. */
int mossnano_max_streams(const mossnano *client); /* how many voices the process takes at once; 0: it takes none */
mossnano_voice *mossnano_open(mossnano *client, const mossnano_voice_options *options, char *error, size_t error_bytes);
bool mossnano_voice_feed(mossnano_voice *voice, const void *packed, size_t frames);
bool mossnano_voice_feed_codes(mossnano_voice *voice, const uint16_t *codes, size_t frames);
bool mossnano_voice_mark(mossnano_voice *voice, const void *text, size_t bytes); /* between what was fed and what will be;
                                                                                    up to 1,000 bytes */
bool mossnano_voice_take_mark(mossnano_voice *voice, mossnano_mark *out); /* the next one whose place was pulled */
bool mossnano_voice_finish(mossnano_voice *voice);
int64_t mossnano_voice_cancel(mossnano_voice *voice); /* be silent, now: says how many samples were heard */
size_t mossnano_voice_pull(mossnano_voice *voice, int16_t *out, size_t samples);
void mossnano_voice_set_gain(mossnano_voice *voice, double gain); /* the next pull goes there from what holds */
bool mossnano_voice_is_speaking(mossnano_voice *voice);
int64_t mossnano_voice_played(const mossnano_voice *voice); /* samples that were pulled; a fade-out counts for nothing */
uint64_t mossnano_voice_underruns(const mossnano_voice *voice);
const char *mossnano_voice_reason(const mossnano_voice *voice); /* once it is over: what went wrong, or "" */
void mossnano_voice_close(mossnano_voice *voice);

#ifdef __cplusplus
}
#endif
#endif

#ifdef MOSSNANO_IMPLEMENTATION
#ifndef _WIN32
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
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
typedef std::atomic<int64_t> mossnano__atomic_i64;
typedef std::atomic<bool> mossnano__atomic_bool;
typedef std::atomic<int> mossnano__atomic_int;
#else
#include <stdatomic.h>
typedef _Atomic int64_t mossnano__atomic_i64;
typedef atomic_bool mossnano__atomic_bool;
typedef atomic_int mossnano__atomic_int;
#endif

enum { MOSSNANO_HANDSHAKE = 0, MOSSNANO_AUDIO = 1, MOSSNANO_TOKENS = 4, MOSSNANO_ERROR = 5, MOSSNANO_END = 7, MOSSNANO_CANCEL = 8,
       MOSSNANO_SETTINGS = 9, MOSSNANO_CREDIT = 10, MOSSNANO_MARK = 11 };
enum { MOSSNANO_NUMBERED = 0x80 };     /* added to a kind: the payload begins with the number of its stream, 4 bytes */
enum { MOSSNANO_MOST_MARKS = 128 };    /* of a voice that nobody took yet, and */
enum { MOSSNANO_VOICE_QUEUE = 3 << 18 }; /* bytes of frames that it did not hear of yet: together less than the 1 MiB
                                            that may wait in a stream of the process */
enum { MOSSNANO_CREDIT_MS = 10 };      /* how often one looks how far a voice was pulled; */
enum { MOSSNANO_CREDIT_STEP_MS = 20 }; /* and what is worth a message */
enum { MOSSNANO_UNITY = 1 << 16 };     /* as a gain */
enum { MOSSNANO_LONGEST = 1 << 20 };   /* no message of the process is longer */
enum { MOSSNANO_PIECE = 1 << 16 };     /* of what is fed in one message: CANCEL must not wait behind a long one */
enum { MOSSNANO_HEAD = 5 };            /* bytes of a message: its length and its kind */
enum { MOSSNANO_QUEUE = 4 << 20 };     /* of messages that the process has not taken yet */
enum { MOSSNANO_BEGINNINGS = 256 };         /* streams that may begin in the ring */
enum { MOSSNANO_LINE = 4096 };         /* bytes of the process' stderr that are given out at once */
enum { MOSSNANO_FIRST_PAUSE_MS = 250, MOSSNANO_LONGEST_PAUSE_MS = 8000 }; /* before a restart; doubles within a row */
#define MOSSNANO_SAMPLES (INT64_C(1) << 40) /* of a stream, at most: `played` is one number of both */
enum { MOSSNANO_STOP_MS = 2000 };      /* how long the process may take to end by itself */
enum { MOSSNANO_LOOK_MS = 50 };        /* how often one who waits for the process looks whether that is over */

#ifdef _WIN32
typedef HANDLE mossnano__thread;
typedef SRWLOCK mossnano__lock;
typedef CONDITION_VARIABLE mossnano__signal;
#else
typedef pthread_t mossnano__thread;
typedef pthread_mutex_t mossnano__lock;
typedef pthread_cond_t mossnano__signal;
#endif

typedef struct mossnano__message { /* its bytes lie behind it */
    struct mossnano__message *next;
    mossnano_voice *voice; /* that it is dropped with; or NULL */
    size_t bytes;
} mossnano__message;

typedef struct mossnano__passed { /* a MARK that came */
    struct mossnano__passed *next;
    mossnano_mark mark;
} mossnano__passed;

struct mossnano_voice { /* a ring, what is put into it and who pulls it: of the client's own streams, or of one numbered */
    mossnano *client;

    /* Under the client's gate: */
    mossnano_voice *next;          /* of the client's */
    uint32_t number;               /* of its stream, where it has one */
    bool is_numbered, is_open;     /* open: what is fed belongs to a stream that was begun */
    bool has_left, has_end;        /* its stream was opened over there, or is about to be; and its END came */
    int64_t fed_bytes, window, granted; /* the last two: samples */
    int64_t frame_samples;         /* of ours; the client's are of the codec's rate */
    mossnano__passed *marks, **marks_end;
    int marks_out;                 /* that nobody took, wherever they are */
    char fault[300], reason[300];  /* the first ERROR; and what it ended with */

    int16_t *ring;                 /* values, not samples; indices only grow, `% capacity` says where they are */
    int64_t capacity, channels, fade_samples, prebuffer; /* the last: values */
    mossnano__atomic_i64 written, taken, drop_before; /* moved by: reader, puller, reader */
    mossnano__atomic_i64 end_of_stream;               /* where the last stream that is over ended in the ring, */
    mossnano__atomic_i64 cut_at;                      /* and where the last one broke off that was lost */
    int64_t begin_at[MOSSNANO_BEGINNINGS];            /* where in the ring a stream begins */
    int64_t begin_stream[MOSSNANO_BEGINNINGS];        /* and which */
    mossnano__atomic_i64 begun, begun_heard;          /* moved by: reader, puller */
    int64_t last_begun;                               /* the reader's */
    mossnano__atomic_i64 opened, ended;               /* streams */
    mossnano__atomic_i64 cancels, cancels_answered;
    mossnano__atomic_i64 underruns;
    mossnano__atomic_bool is_sounding;                /* PCM of a stream came, its END did not */
    mossnano__atomic_int gain;                        /* MOSSNANO_UNITY: 1 */

    /* The puller's. A pull is `real` samples from `pull_at`, then a fade-out, then silence. */
    int64_t pull_at, real, audible; /* audible: samples, the real ones and the fade-out */
    int64_t dropped_left;          /* samples that a CANCEL dropped, and that its fade-out may still use */
    int64_t level;                 /* how loud we are, from 0 to fade_samples; less only in and after a fade */
    bool is_fading_out, was_cut, fades_dropped, is_complete;
    bool is_gathering, is_fresh;   /* fresh: nothing of the stream was given yet: no fade-in, unless we were cut off */
    bool is_mono;
    int64_t gain_was, gain_is;     /* at the beginning and at the end of the pull */
    int64_t noticed_cancels;
    int64_t next_stream, stream, heard; /* that is being given out, and how many samples of it were */
    mossnano__atomic_i64 played;   /* both, for other threads */
    int64_t cut_heard;             /* the last cut_at that we came to */
    int16_t *last;                 /* the last sample that was given: a fade-out holds it where nothing follows */
};

struct mossnano {
#ifdef _WIN32
    HANDLE process, job, input, output, log;
#else
    pid_t process;
    int input, output, log;
#endif
    mossnano__thread reader, writer, logger;
    mossnano__lock gate;           /* of the controlling thread and ours; the puller never takes it. It guards these: */
    mossnano__signal queue_changed;
    mossnano__message *queue, **queue_end; /* that the writer has not begun yet */
    size_t queued_bytes;           /* theirs, and those of the message that is being written */
    bool cancel_is_due;            /* before all that is in the queue */
    bool is_closing;
    mossnano_voice *voices;        /* that were opened */
    uint32_t numbers_used;
    bool has_process;              /* that may be killed: its number is still its own */
    mossnano_options options;
    mossnano_format format;
    bool fatal_was_said;           /* the reader's, as is `message` */
    bool start_fails;              /* with what goes wrong before the first HANDSHAKE: on_error is not told */
    char fault[2200], reason[2200]; /* what was said last; and what was, when it failed */
    uint8_t *message;
    mossnano__atomic_bool has_ring;
    int64_t opened_before_cancel;  /* streams, at the last one; under the gate */
    mossnano__atomic_bool is_stopping, is_given_up; /* given up: killed, and not waited for any more */
    mossnano__atomic_bool is_late;                  /* to say HANDSHAKE: it was killed */
    mossnano__atomic_bool has_exited;               /* its stderr ends soon */
    mossnano__atomic_bool is_gone, is_over;         /* the process; and the reader, too */
    mossnano__atomic_int state, pid, restarts;
    int restarts_in_a_row;         /* the reader's */
    char *handshake, version[64];
    mossnano_voice plain;          /* of the streams that have no number of their own */
};

/* --- what differs between systems ------------------------------------------------------------------------------ */

#ifdef _WIN32
#define MOSSNANO_THREAD(name) static DWORD WINAPI name(LPVOID context)
typedef LPTHREAD_START_ROUTINE mossnano__main;

static bool mossnano__start_thread(mossnano__thread *t, mossnano__main main, mossnano *c) {
    return (*t = CreateThread(NULL, 0, main, c, 0, NULL)) != NULL;
}
static void mossnano__join(mossnano__thread t) { WaitForSingleObject(t, INFINITE); CloseHandle(t); }
static void mossnano__be_deaf(void) {} /* to signals */
static void mossnano__make_gate(mossnano *c) { InitializeSRWLock(&c->gate); InitializeConditionVariable(&c->queue_changed); }
static void mossnano__unmake_gate(mossnano *c) { (void)c; }
static void mossnano__enter(mossnano *c) { AcquireSRWLockExclusive(&c->gate); }
static void mossnano__leave(mossnano *c) { ReleaseSRWLockExclusive(&c->gate); }
static void mossnano__wait(mossnano *c, int ms) { /* below 0: for as long as it takes */
    SleepConditionVariableSRW(&c->queue_changed, &c->gate, ms < 0 ? INFINITE : (DWORD)ms, 0);
}
static void mossnano__wake(mossnano *c) { WakeAllConditionVariable(&c->queue_changed); }
static void mossnano__sleep_ms(int ms) { Sleep((DWORD)ms); }
static void mossnano__close_input(mossnano *c) { CloseHandle(c->input); }
static void mossnano__kill_process(mossnano *c) { TerminateJobObject(c->job, 1); }
static int64_t mossnano__now_ms(void) { return (int64_t)GetTickCount64(); }
static void mossnano__release(mossnano *c) {
    CloseHandle(c->output), CloseHandle(c->process), CloseHandle(c->job);
    if (c->options.on_log) CloseHandle(c->log);
}

static size_t mossnano__read_some(mossnano *c, uint8_t *out, size_t bytes) {
    DWORD got = 0;
    return ReadFile(c->output, out, (DWORD)bytes, &got, NULL) ? got : 0;
}

static size_t mossnano__read_log(mossnano *c, char *out, size_t bytes) {
    DWORD got = 0;
    return ReadFile(c->log, out, (DWORD)bytes, &got, NULL) ? got : 0;
}

static void mossnano__write(mossnano *c, const uint8_t *data, size_t bytes) { /* when it fails, the reader finds out why */
    DWORD put = 0;
    for (; bytes; data += put, bytes -= put)
        if (!WriteFile(c->input, data, (DWORD)bytes, &put, NULL) || !put) return;
}

static int mossnano__exit_status(mossnano *c) {
    DWORD status = 0;
    WaitForSingleObject(c->process, INFINITE);
    GetExitCodeProcess(c->process, &status);
    TerminateJobObject(c->job, 1); /* whoever holds its stderr open */
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

static bool mossnano__spawn(mossnano *c, char *error, size_t error_bytes) {
    const char *const *command = c->options.command;
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
    HANDLE ends[6] = {NULL, NULL, NULL, NULL, NULL, NULL};
    bool ok = line && wide && MultiByteToWideChar(CP_UTF8, 0, line, -1, wide, (int)most) &&
              CreatePipe(&ends[0], &ends[1], &inherited, 0) && CreatePipe(&ends[2], &ends[3], &inherited, 0) &&
              SetHandleInformation(ends[1], HANDLE_FLAG_INHERIT, 0) && SetHandleInformation(ends[2], HANDLE_FLAG_INHERIT, 0);
    bool has_log = c->options.on_log != NULL;
    if (has_log) ok = ok && CreatePipe(&ends[4], &ends[5], &inherited, 0) && SetHandleInformation(ends[4], HANDLE_FLAG_INHERIT, 0);
    start.hStdInput = ends[0], start.hStdOutput = ends[3];
    start.hStdError = has_log ? ends[5] : GetStdHandle(STD_ERROR_HANDLE);
    c->input = ends[1], c->output = ends[2], c->log = ends[4];
    ok = ok && CreateProcessW(NULL, wide, NULL, NULL, TRUE, CREATE_NO_WINDOW | CREATE_SUSPENDED, NULL, NULL, &start, &made);
    if (!ok) snprintf(error, error_bytes, "%s cannot be started (Windows error %lu): is it installed and on the PATH?", command[0], GetLastError());
    for (int i = 0; i < 6; i++) if (ends[i] && (!ok || i == 0 || i == 3 || i == 5)) CloseHandle(ends[i]);
    free(line), free(wide);
    if (!ok) return false;
    JOBOBJECT_EXTENDED_LIMIT_INFORMATION limit; /* the launcher that pip makes has a child: end both, also if we crash */
    memset(&limit, 0, sizeof limit);
    limit.BasicLimitInformation.LimitFlags = JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE;
    c->pid = (int)made.dwProcessId;
    c->process = made.hProcess, c->job = CreateJobObjectW(NULL, NULL);
    SetInformationJobObject(c->job, JobObjectExtendedLimitInformation, &limit, sizeof limit);
    AssignProcessToJobObject(c->job, made.hProcess);
    ResumeThread(made.hThread);
    CloseHandle(made.hThread);
    return true;
}
#else
extern char **environ;

#define MOSSNANO_THREAD(name) static void *name(void *context)
typedef void *(*mossnano__main)(void *);

static bool mossnano__start_thread(mossnano__thread *t, mossnano__main main, mossnano *c) {
    return pthread_create(t, NULL, main, c) == 0;
}
static void mossnano__join(mossnano__thread t) { pthread_join(t, NULL); }
#ifdef __APPLE__ /* its conditions know no other clock */
#define MOSSNANO_CLOCK CLOCK_REALTIME
static void mossnano__choose_clock(pthread_condattr_t *how) { (void)how; }
#else
#define MOSSNANO_CLOCK CLOCK_MONOTONIC
static void mossnano__choose_clock(pthread_condattr_t *how) { pthread_condattr_setclock(how, MOSSNANO_CLOCK); }
#endif
static void mossnano__make_gate(mossnano *c) {
    pthread_condattr_t how;
    pthread_condattr_init(&how);
    mossnano__choose_clock(&how);
    pthread_mutex_init(&c->gate, NULL);
    pthread_cond_init(&c->queue_changed, &how);
    pthread_condattr_destroy(&how);
}
static void mossnano__unmake_gate(mossnano *c) { pthread_mutex_destroy(&c->gate); pthread_cond_destroy(&c->queue_changed); }
static void mossnano__enter(mossnano *c) { pthread_mutex_lock(&c->gate); }
static void mossnano__leave(mossnano *c) { pthread_mutex_unlock(&c->gate); }
static void mossnano__wait(mossnano *c, int ms) { /* below 0: for as long as it takes */
    struct timespec until;
    if (ms < 0) { pthread_cond_wait(&c->queue_changed, &c->gate); return; }
    clock_gettime(MOSSNANO_CLOCK, &until);
    until.tv_nsec += ms * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000, until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&c->queue_changed, &c->gate, &until);
}
static void mossnano__wake(mossnano *c) { pthread_cond_broadcast(&c->queue_changed); }

static int64_t mossnano__now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void mossnano__be_deaf(void) { /* signals are for your threads; a SIGPIPE, of ours, is for nobody */
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
}

static void mossnano__sleep_ms(int ms) { struct timespec pause = {0, ms * 1000000L}; nanosleep(&pause, NULL); }
static void mossnano__close_input(mossnano *c) { close(c->input); }
static void mossnano__kill_process(mossnano *c) { kill(-c->process, SIGKILL); } /* its group: a wrapper may have children */
static void mossnano__release(mossnano *c) {
    close(c->output);
    if (c->options.on_log) close(c->log);
    while (waitpid(c->process, NULL, 0) < 0 && errno == EINTR) {}
}

static bool mossnano__waits_for(mossnano *c, int pipe, short event) { /* false: it is given up */
    struct pollfd what = {pipe, event, 0};
    while (!c->is_given_up && poll(&what, 1, MOSSNANO_LOOK_MS) <= 0)
        if (c->is_late || (event == POLLOUT && c->is_gone) || (pipe == c->log && c->has_exited)) return false;
    return !c->is_given_up;
}

static size_t mossnano__read_some(mossnano *c, uint8_t *out, size_t bytes) {
    ssize_t got;
    if (!mossnano__waits_for(c, c->output, POLLIN)) return 0;
    do got = read(c->output, out, bytes); while (got < 0 && errno == EINTR);
    return got > 0 ? (size_t)got : 0;
}

static size_t mossnano__read_log(mossnano *c, char *out, size_t bytes) {
    ssize_t got;
    if (!mossnano__waits_for(c, c->log, POLLIN)) return 0;
    do got = read(c->log, out, bytes); while (got < 0 && errno == EINTR);
    return got > 0 ? (size_t)got : 0;
}

static void mossnano__write(mossnano *c, const uint8_t *data, size_t bytes) { /* when it fails, the reader finds out why */
    while (bytes && mossnano__waits_for(c, c->input, POLLOUT)) {
        ssize_t put = write(c->input, data, bytes);
        if (put > 0) data += put, bytes -= (size_t)put;
        else if (errno != EINTR && errno != EAGAIN) return;
    }
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

static bool mossnano__spawn(mossnano *c, char *error, size_t error_bytes) {
    const char *const *command = c->options.command;
    int ends[6] = {-1, -1, -1, -1, -1, -1};
    bool has_log = c->options.on_log != NULL;
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_t attributes; /* a group of its own: we end it, Ctrl-C does not. And no signal that the host blocks */
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    sigset_t none, all;
    sigemptyset(&none), posix_spawnattr_setsigmask(&attributes, &none);
    sigfillset(&all), sigdelset(&all, SIGKILL), sigdelset(&all, SIGSTOP), posix_spawnattr_setsigdefault(&attributes, &all);
    int number = mossnano__pipe(ends) && mossnano__pipe(ends + 2) && (!has_log || mossnano__pipe(ends + 4)) ? 0 : errno;
    if (!number) posix_spawn_file_actions_adddup2(&actions, ends[0], 0);
    if (!number) posix_spawn_file_actions_adddup2(&actions, ends[3], 1);
    if (!number && has_log) posix_spawn_file_actions_adddup2(&actions, ends[5], 2);
    bool has_stderr = has_log || fcntl(2, F_GETFD) >= 0; /* without one, the child's first file would become its stderr */
    if (!has_stderr) posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
    if (!number) number = posix_spawnp(&c->process, command[0], &actions, &attributes, (char *const *)command, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    c->input = ends[1], c->output = ends[2], c->log = ends[4];
    if (!number) c->pid = (int)c->process;
    if (!number) fcntl(c->input, F_SETFL, O_NONBLOCK); /* the writer looks up now and then */
    for (int i = 0; i < 6; i++) if (ends[i] >= 0 && (number || i == 0 || i == 3 || i == 5)) close(ends[i]);
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

/* A process that never became ready would not do so the next time. */
static bool mossnano__may_restart(mossnano *c) {
    return c->has_ring && !c->is_stopping && c->restarts_in_a_row < c->options.restart;
}

static void mossnano__say(mossnano *c, const char *code, const char *text, bool fatal) {
    c->fatal_was_said |= fatal;
    if (c->is_stopping) return;
    if (fatal || !c->has_ring) snprintf(c->fault, sizeof c->fault, "%s (%s)", text, code);
    bool is_told = c->options.on_error && (c->has_ring || !c->start_fails);
    if (is_told) c->options.on_error(c->options.context, code, text, fatal && !mossnano__may_restart(c));
}

static void mossnano__kill(mossnano *c) {
    mossnano__enter(c);
    if (c->has_process) mossnano__kill_process(c);
    mossnano__leave(c);
}

static double mossnano__fade_ms(double asked) { return asked > 0 ? asked : asked < 0 ? 0 : 5; }

static bool mossnano__make_ring(mossnano_voice *v, int64_t samples, double fade_ms, double prebuffer_ms) {
    const mossnano_format *f = &v->client->format;
    v->channels = f->channels;
    v->capacity = samples * v->channels; /* whole samples: their channels lie side by side */
    v->fade_samples = (int64_t)(mossnano__fade_ms(fade_ms) * f->sample_rate / 1000);
    v->prebuffer = (int64_t)(prebuffer_ms * f->sample_rate / 1000) * v->channels;
    v->ring = (int16_t *)malloc((size_t)v->capacity * sizeof *v->ring);
    v->last = (int16_t *)calloc((size_t)v->channels, sizeof *v->last);
    v->marks_end = &v->marks;
    return v->ring && v->last;
}

static bool mossnano__make_plain_ring(mossnano *c, const char *json) {
    double seconds = c->options.ring_seconds > 0 ? c->options.ring_seconds : 10;
    int64_t samples = (int64_t)(seconds * c->format.sample_rate) + c->format.max_audio_bytes / 2 / c->format.channels;
    c->handshake = (char *)malloc(strlen(json) + 1);
    if (c->handshake) strcpy(c->handshake, json);
    mossnano__text(json, "version", c->version, sizeof c->version);
    return c->handshake && mossnano__make_ring(&c->plain, samples, c->options.fade_ms, c->options.prebuffer_ms);
}

static bool mossnano__shake_hands(mossnano *c, const char *json) {
    mossnano_format said, *f = &said;
    const char *keys[] = {"sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes", "max_audio_bytes"};
    int *numbers[] = {&f->sample_rate, &f->channels, &f->frame_samples, &f->quantizers, &f->codebook_size, &f->frame_bytes, &f->max_audio_bytes};
    bool ok = mossnano__number(json, "protocol") == 1 && !strncmp(mossnano__find(json, "direction"), "\"decode\"", 8);
    for (int i = 0; i < 7; i++) ok &= (*numbers[i] = mossnano__number(json, keys[i])) > 0;
    bool is_16_bit = !*mossnano__find(json, "sample_format") || !strncmp(mossnano__find(json, "sample_format"), "\"s16le\"", 7);
    if (ok && !is_16_bit) return mossnano__say(c, "handshake", "mossnano.h takes s16le: drop --sample-format", true), false;
    if (!ok) return mossnano__say(c, "handshake", "this is no decoder of protocol 1: update mossnano.h, or drop --encode", true), false;
    for (int i = 0; i < 7 && c->has_ring; i++) {
        int was = mossnano__number(c->handshake, keys[i]);
        char text[120];
        snprintf(text, sizeof text, "%s was %d and is now %d: start a new voice for other weights", keys[i], was, *numbers[i]);
        if (was != *numbers[i]) return mossnano__say(c, "handshake", text, true), false;
    }
    if (!c->has_ring) {
        c->format = said;
        const char *advice = "no memory for the ring: lower ring_seconds";
        if (!mossnano__make_plain_ring(c, json)) return mossnano__say(c, "out_of_memory", advice, true), false;
    }
    mossnano__enter(c);
    bool is_in_time = !c->is_late;
    if (is_in_time) c->has_ring = true;
    if (is_in_time) c->state = MOSSNANO_READY;
    mossnano__leave(c);
    return is_in_time;
}

static bool mossnano__is_cancelled(mossnano_voice *v) { return v->cancels != v->cancels_answered; }

static void mossnano__begin_stream(mossnano_voice *v) { /* a stream begins here */
    while (v->begun - v->begun_heard == MOSSNANO_BEGINNINGS) {
        if (mossnano__is_cancelled(v) || v->client->is_stopping) return; /* nothing of it will be pulled */
        mossnano__sleep_ms(2);
    }
    v->last_begun = v->ended;
    v->begin_at[v->begun % MOSSNANO_BEGINNINGS] = v->written;
    v->begin_stream[v->begun % MOSSNANO_BEGINNINGS] = v->last_begun;
    v->begun++;
}

static void mossnano__push(mossnano_voice *v, const uint8_t *pcm, int64_t values) {
    if (v->last_begun != v->ended) mossnano__begin_stream(v);
    for (int64_t i = 0; i < values && !mossnano__is_cancelled(v) && !v->client->is_stopping;) {
        int64_t at = v->written, room = v->capacity - (at - v->taken);
        if (!room) { mossnano__sleep_ms(2); continue; } /* asleep, not signalled: the puller must not touch a lock */
        int64_t end = at + (room < values - i ? room : values - i);
        for (; at < end; at++, i++) v->ring[at % v->capacity] = (int16_t)(pcm[2 * i] | pcm[2 * i + 1] << 8);
        v->written = end;
        v->is_sounding = true;
    }
}

static void mossnano__answer_cancel(mossnano_voice *v, int64_t streams, int64_t number) { /* all that were open at it are over */
    v->ended = streams;
    if (mossnano__is_cancelled(v)) v->drop_before = (int64_t)v->written;
    v->cancels_answered = number;
}

/* Of a voice: all with the gate. */
static bool mossnano__is_over(const mossnano_voice *v) { return v->ended == v->opened; }

static void mossnano__end_voice(mossnano_voice *v, const char *reason) {
    if (mossnano__is_over(v)) return;
    snprintf(v->reason, sizeof v->reason, "%s", reason);
    v->is_sounding = v->is_open = false;
    v->ended = (int64_t)v->opened; /* only now: who sees it may read the reason */
}

static void mossnano__pass_mark(mossnano_voice *v, const uint8_t *payload, size_t bytes) {
    mossnano__passed *passed = bytes >= 8 ? (mossnano__passed *)calloc(1, sizeof *passed) : NULL;
    if (!passed) return;
    for (int i = 0; i < 8; i++) passed->mark.sample |= (int64_t)((uint64_t)payload[i] << 8 * i);
    passed->mark.bytes = bytes - 8 < sizeof passed->mark.text ? bytes - 8 : sizeof passed->mark.text - 1;
    memcpy(passed->mark.text, payload + 8, passed->mark.bytes);
    *v->marks_end = passed;
    v->marks_end = &passed->next;
}

static void mossnano__take_of_voice(mossnano_voice *v, int kind, const uint8_t *payload, size_t bytes) {
    const char *json = (const char *)payload;
    int64_t values = (int64_t)bytes / 2, room = v->capacity - (v->written - v->taken);
    if (kind == MOSSNANO_AUDIO && values <= room) mossnano__push(v, payload, values);
    else if (kind == MOSSNANO_AUDIO) mossnano__end_voice(v, "the process sent more than it was granted");
    if (kind == MOSSNANO_MARK) mossnano__pass_mark(v, payload, bytes);
    if (kind == MOSSNANO_ERROR && !v->fault[0]) {
        char code[64];
        mossnano__text(json, "code", code, sizeof code);
        mossnano__text(json, "message", v->fault, sizeof v->fault - sizeof code - 4);
        bool is_refused = !strcmp(code, "too_many_streams") || !strcmp(code, "late_stream"); /* no END follows */
        strcat(strcat(strcat(v->fault, " ("), code), ")");
        if (is_refused) mossnano__end_voice(v, v->fault);
    }
    if (kind == MOSSNANO_END) {
        v->has_end = true;
        v->end_of_stream = (int64_t)v->written;
        mossnano__end_voice(v, v->fault);
    }
}

static bool mossnano__take_numbered(mossnano *c, int kind, size_t bytes) { /* is there somebody whom it concerns? */
    uint32_t number = 0;
    for (int i = 0; i < 4 && bytes >= 4; i++) number |= (uint32_t)c->message[i] << 8 * i;
    mossnano__enter(c);
    mossnano_voice *v = c->voices;
    while (v && v->number != number) v = v->next;
    bool is_there = v && bytes >= 4 && !mossnano__is_over(v);
    if (is_there) mossnano__take_of_voice(v, kind, c->message + 4, bytes - 4);
    mossnano__leave(c);
    return is_there;
}

static void mossnano__end(mossnano *c, const char *json) {
    c->plain.end_of_stream = (int64_t)c->plain.written;
    c->plain.is_sounding = false;
    if (!mossnano__is_true(json, "cancelled")) {
        c->plain.ended++;
        c->restarts_in_a_row = 0;
        return;
    }
    char echo[64], *rest; /* our CANCEL carried how many streams were open by then, and its number */
    mossnano__text(json, "echo", echo, sizeof echo);
    int64_t streams = strtoll(echo, &rest, 10);
    mossnano__answer_cancel(&c->plain, streams, strtoll(rest, NULL, 10));
}

static bool mossnano__take(mossnano *c, int kind, size_t bytes) {
    const char *json = (const char *)c->message; /* ends with a 0 */
    char code[64], text[2048];
    if (c->state == MOSSNANO_STARTING && kind == MOSSNANO_HANDSHAKE) return mossnano__shake_hands(c, json);
    bool is_end = (kind & ~MOSSNANO_NUMBERED) == MOSSNANO_END;
    if (is_end && c->fatal_was_said) return true; /* behind a fatal ERROR it says what was sent, which is not all */
    if (kind & MOSSNANO_NUMBERED) {
        kind &= ~MOSSNANO_NUMBERED;
        if (!mossnano__take_numbered(c, kind, bytes)) return true; /* it was closed */
        if (kind == MOSSNANO_END) c->restarts_in_a_row = 0;
        if (kind != MOSSNANO_ERROR) return true;
        json += 4;
    }
    if (kind == MOSSNANO_AUDIO && c->state == MOSSNANO_READY) mossnano__push(&c->plain, c->message, (int64_t)bytes / 2);
    if (kind == MOSSNANO_END) mossnano__end(c, json);
    if (kind == MOSSNANO_ERROR) {
        mossnano__text(json, "code", code, sizeof code);
        mossnano__text(json, "message", text, sizeof text);
        mossnano__say(c, code, text, mossnano__is_true(json, "fatal"));
    }
    return true;
}

static void mossnano__drop_queued(mossnano *c, const mossnano_voice *maybe_voice) { /* all, or of one; with the gate */
    mossnano__message **at = &c->queue;
    while (*at) {
        mossnano__message *message = *at;
        if (maybe_voice && message->voice != maybe_voice) { at = &message->next; continue; }
        *at = message->next;
        c->queued_bytes -= message->bytes;
        free(message);
    }
    c->queue_end = at;
}

static bool mossnano__bury(mossnano *c, const char *code, const char *text) { /* is it to be started again? */
    char without[100] = "", again[sizeof c->fault + 160];
    bool is_restarted = mossnano__may_restart(c);
    mossnano__enter(c);
    int64_t first = c->plain.ended > c->opened_before_cancel ? (int64_t)c->plain.ended : c->opened_before_cancel; /* that is lost */
    int64_t last = c->plain.opened - 1;
    mossnano__drop_queued(c, NULL);
    c->plain.is_open = c->cancel_is_due = c->plain.is_sounding = c->has_process = false;
    c->pid = 0;
    c->plain.cut_at = (int64_t)c->plain.written; /* what came of its streams can still be pulled, and then fades out */
    mossnano__answer_cancel(&c->plain, c->plain.opened, c->plain.cancels);
    c->is_gone = true;
    const char *form = strcmp(code, "process_ended") ? "%s" : "%s (process_ended)";
    if (!c->fatal_was_said) snprintf(c->fault, sizeof c->fault, form, text);
    for (mossnano_voice *v = c->voices; v; v = v->next) {
        if (!mossnano__is_over(v)) v->cut_at = (int64_t)v->written;
        mossnano__end_voice(v, c->fault);
    }
    if (!is_restarted) memcpy(c->reason, c->fault, sizeof c->reason);
    c->state = is_restarted ? MOSSNANO_STARTING : MOSSNANO_FAILED;
    mossnano__wake(c);
    mossnano__leave(c);
    if (c->is_stopping) return false;
    if (first <= last && c->options.on_lost) c->options.on_lost(c->options.context, first, last);
    const char *streams = ", without what was fed to the streams %lld to %lld";
    if (first <= last) snprintf(without, sizeof without, streams, (long long)first, (long long)last);
    snprintf(again, sizeof again, "%s; it is started again%s", text, without);
    if (is_restarted) mossnano__say(c, code, again, true);
    else if (!c->fatal_was_said) mossnano__say(c, code, text, true);
    return is_restarted;
}

static void mossnano__read_messages(mossnano *c) {
    uint8_t head[MOSSNANO_HEAD];
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
}

/* --- the writer ------------------------------------------------------------------------------------------------- */

static void mossnano__make_head(uint8_t *head, int kind, size_t bytes) {
    for (int i = 0; i < 4; i++) head[i] = (uint8_t)((bytes + 1) >> 8 * i);
    head[4] = (uint8_t)kind;
}

static mossnano__message *mossnano__make_message(mossnano_voice *v, int kind, const void *payload, size_t bytes) {
    size_t number_bytes = v->is_numbered ? 4 : 0;
    mossnano__message *message = (mossnano__message *)malloc(sizeof *message + MOSSNANO_HEAD + number_bytes + bytes);
    if (!message) return NULL;
    message->next = NULL;
    message->voice = v;
    message->bytes = MOSSNANO_HEAD + number_bytes + bytes;
    uint8_t *head = (uint8_t *)(message + 1);
    mossnano__make_head(head, v->is_numbered ? kind | MOSSNANO_NUMBERED : kind, number_bytes + bytes);
    for (size_t i = 0; i < number_bytes; i++) head[MOSSNANO_HEAD + i] = (uint8_t)(v->number >> 8 * i);
    if (bytes) memcpy(head + MOSSNANO_HEAD + number_bytes, payload, bytes);
    return message;
}

static void mossnano__enqueue(mossnano *c, mossnano__message *first) { /* and all behind it; under the gate */
    *c->queue_end = first;
    for (; first; first = first->next) {
        c->queued_bytes += first->bytes;
        c->queue_end = &first->next;
    }
    mossnano__wake(c);
}

static mossnano__message *mossnano__take_from_queue(mossnano *c) {
    mossnano__message *message = c->queue;
    c->queue = message->next;
    if (!c->queue) c->queue_end = &c->queue;
    if (message->voice) message->voice->has_left = true;
    return message;
}

static size_t mossnano__make_cancel(mossnano *c, char *out, size_t room) { /* made when it leaves: it never lacks memory */
    int bytes = snprintf(out + MOSSNANO_HEAD, room - MOSSNANO_HEAD, "%lld %lld", (long long)c->opened_before_cancel,
                         (long long)c->plain.cancels);
    mossnano__make_head((uint8_t *)out, MOSSNANO_CANCEL, (size_t)bytes);
    return MOSSNANO_HEAD + (size_t)bytes;
}

/* A CREDIT, where a voice was pulled so far that one is due. Credit is all that was pulled and the window. */
static size_t mossnano__make_credit(mossnano *c, uint8_t *out) {
    for (mossnano_voice *v = c->voices; v; v = v->next) {
        int64_t granted = v->window + v->taken / v->channels, more = granted - v->granted;
        int64_t step = (int64_t)c->format.sample_rate * MOSSNANO_CREDIT_STEP_MS / 1000;
        bool is_due = more > 0 && (more >= step || v->taken == v->written); /* an empty ring waits for what is granted now */
        if (!is_due || !v->has_left || mossnano__is_over(v)) continue;
        v->granted = granted;
        mossnano__make_head(out, MOSSNANO_CREDIT | MOSSNANO_NUMBERED, 12);
        for (int i = 0; i < 4; i++) out[MOSSNANO_HEAD + i] = (uint8_t)(v->number >> 8 * i);
        for (int i = 0; i < 8; i++) out[MOSSNANO_HEAD + 4 + i] = (uint8_t)((uint64_t)granted >> 8 * i);
        return MOSSNANO_HEAD + 12;
    }
    return 0;
}

static bool mossnano__write_next(mossnano *c) { /* false: that was all */
    uint8_t small[64]; /* a CANCEL, or a CREDIT */
    size_t small_bytes = 0;
    mossnano__message *message = NULL;
    mossnano__enter(c);
    while (true) {
        if (c->cancel_is_due) small_bytes = mossnano__make_cancel(c, (char *)small, sizeof small);
        else if (!c->is_gone) small_bytes = mossnano__make_credit(c, small);
        c->cancel_is_due = false;
        if (!small_bytes && c->queue) message = mossnano__take_from_queue(c);
        if (message || small_bytes || c->is_closing || c->is_gone) break;
        mossnano__wait(c, c->voices ? MOSSNANO_CREDIT_MS : -1); /* nobody wakes us when a voice is pulled */
    }
    mossnano__leave(c);
    if (!message && !small_bytes) return false;
    if (!message) {
        mossnano__write(c, small, small_bytes);
        return true;
    }
    mossnano__write(c, (uint8_t *)(message + 1), message->bytes);
    mossnano__enter(c);
    c->queued_bytes -= message->bytes;
    mossnano__leave(c);
    free(message);
    return true;
}

static void mossnano__await_start(mossnano *c) { /* there is nothing to write before it; and whoever is late is ended */
    double seconds = c->options.start_seconds > 0 ? c->options.start_seconds : 60;
    int64_t until = mossnano__now_ms() + (int64_t)(1000 * (seconds < 1e9 ? seconds : 1e9));
    while (c->state == MOSSNANO_STARTING && !c->is_gone && !c->is_stopping && mossnano__now_ms() < until) mossnano__sleep_ms(2);
    mossnano__enter(c);
    c->is_late = c->state == MOSSNANO_STARTING && !c->is_gone && !c->is_stopping;
    bool is_late = c->is_late;
    mossnano__leave(c);
    if (is_late) mossnano__kill(c);
}

MOSSNANO_THREAD(mossnano__write_messages) {
    mossnano *c = (mossnano *)context;
    mossnano__be_deaf();
    mossnano__await_start(c);
    while (mossnano__write_next(c)) {}
    mossnano__close_input(c); /* which the process takes as the end */
    return 0;
}

/* --- the process ------------------------------------------------------------------------------------------------ */

static size_t mossnano__give_lines(mossnano *c, char *text, size_t bytes, bool is_all) { /* says how much is left */
    char *line = text, *end;
    for (; (end = (char *)memchr(line, '\n', (size_t)(text + bytes - line))); line = end + 1) {
        *end = 0;
        if (end > line && end[-1] == '\r') end[-1] = 0;
        c->options.on_log(c->options.context, line);
    }
    size_t left = (size_t)(text + bytes - line);
    if (left && (is_all || left == MOSSNANO_LINE)) {
        line[left] = 0;
        c->options.on_log(c->options.context, line);
        return 0;
    }
    memmove(text, line, left);
    return left;
}

MOSSNANO_THREAD(mossnano__read_lines) {
    mossnano *c = (mossnano *)context;
    char text[MOSSNANO_LINE + 1];
    size_t left = 0;
    mossnano__be_deaf();
    for (size_t got; (got = mossnano__read_log(c, text + left, MOSSNANO_LINE - left)) > 0;)
        left = mossnano__give_lines(c, text, left + got, false);
    mossnano__give_lines(c, text, left, true);
    return 0;
}

static bool mossnano__run_process(mossnano *c) { /* is it to be started again? */
    char text[2200];
    c->fatal_was_said = c->is_late = c->has_exited = c->is_gone = false;
    if (!mossnano__spawn(c, text, sizeof text)) return mossnano__bury(c, "not_started", text);
    mossnano__enter(c);
    c->has_process = true;
    mossnano__leave(c);
    bool has_writer = mossnano__start_thread(&c->writer, mossnano__write_messages, c);
    bool has_logger = c->options.on_log && mossnano__start_thread(&c->logger, mossnano__read_lines, c);
    bool has_threads = has_writer && (has_logger || !c->options.on_log);
    if (!has_threads) mossnano__say(c, "no_thread", "no thread to be had", true);
    if (!has_threads || c->is_stopping) mossnano__kill(c); /* stopping: that came too early to do it */
    mossnano__read_messages(c);
    snprintf(text, sizeof text, "the process ended by itself with status %d: its stderr says more", mossnano__exit_status(c));
    c->has_exited = true;
    if (has_logger) mossnano__join(c->logger); /* its last lines say why */
    const char *late = c->is_late ? "no HANDSHAKE in time: allow more start_seconds, or look at its stderr" : NULL;
    bool is_restarted = mossnano__bury(c, late ? "timeout" : "process_ended", late ? late : text);
    if (has_writer) mossnano__join(c->writer);
    else mossnano__close_input(c);
    mossnano__release(c);
    return is_restarted;
}

static void mossnano__pause(mossnano *c) { /* before a restart */
    int ms = MOSSNANO_FIRST_PAUSE_MS << (c->restarts_in_a_row < 10 ? c->restarts_in_a_row : 10);
    if (ms > MOSSNANO_LONGEST_PAUSE_MS) ms = MOSSNANO_LONGEST_PAUSE_MS;
    for (int64_t until = mossnano__now_ms() + ms; mossnano__now_ms() < until && !c->is_stopping;) mossnano__sleep_ms(10);
    c->restarts_in_a_row++;
}

MOSSNANO_THREAD(mossnano__run) {
    mossnano *c = (mossnano *)context;
    mossnano__be_deaf();
    while (mossnano__run_process(c)) {
        mossnano__pause(c);
        if (c->is_stopping) break;
        c->restarts++;
    }
    c->is_over = true;
    return 0;
}

/* --- what you call ---------------------------------------------------------------------------------------------- */

static mossnano *mossnano__make(const mossnano_options *options, bool start_fails, char *error, size_t error_bytes) {
    double ring_ms = 1000 * (options->ring_seconds > 0 ? options->ring_seconds : 10);
    if (!(options->prebuffer_ms >= 0 && options->prebuffer_ms <= ring_ms)) {
        snprintf(error, error_bytes, "prebuffer_ms %g: 0 or more, and it must fit into the ring of %g ms (see ring_seconds)",
                 options->prebuffer_ms, ring_ms);
        return NULL;
    }
    mossnano *c = (mossnano *)calloc(1, sizeof *c);
    if (c) c->message = (uint8_t *)malloc(MOSSNANO_LONGEST);
    if (!c || !c->message || !options->command || !options->command[0]) {
        snprintf(error, error_bytes, "options.command is empty, or there is no memory");
        free(c ? c->message : NULL), free(c);
        return NULL;
    }
    c->options = *options;
    c->start_fails = start_fails;
    c->plain.client = c;
    c->plain.gain = MOSSNANO_UNITY;
    c->plain.gain_is = MOSSNANO_UNITY;
    c->plain.last_begun = c->plain.stream = -1;
    c->queue_end = &c->queue;
    mossnano__make_gate(c);
    if (mossnano__start_thread(&c->reader, mossnano__run, c)) return c;
    snprintf(error, error_bytes, "no thread to be had");
    mossnano__unmake_gate(c), free(c->message), free(c);
    return NULL;
}

mossnano *mossnano_launch(const mossnano_options *options, char *error, size_t error_bytes) {
    return mossnano__make(options, false, error, error_bytes);
}

mossnano *mossnano_start(const mossnano_options *options, char *error, size_t error_bytes) {
    mossnano *c = mossnano__make(options, true, error, error_bytes);
    if (!c) return NULL;
    while (c->state == MOSSNANO_STARTING && !c->is_over) mossnano__sleep_ms(2);
    if (c->has_ring) return c; /* one that has failed already says so when it is fed */
    snprintf(error, error_bytes, "%s", c->reason);
    mossnano_stop(c);
    return NULL;
}

enum mossnano_state mossnano_state(const mossnano *c) { return (enum mossnano_state)(int)c->state; }
const char *mossnano_reason(const mossnano *c) { return c->state == MOSSNANO_FAILED ? c->reason : ""; }

mossnano_format mossnano_get_format(const mossnano *c) {
    static const mossnano_format unknown = {0, 0, 0, 0, 0, 0, 0};
    return c->has_ring ? c->format : unknown;
}

int mossnano_pid(const mossnano *c) { return c->pid; }
int mossnano_restarts(const mossnano *c) { return c->restarts; }
const char *mossnano_version(const mossnano *c) { return c->has_ring ? c->version : ""; }
const char *mossnano_handshake(const mossnano *c) { return c->has_ring ? c->handshake : ""; }
bool mossnano_is_demo(const mossnano *c) { return c->has_ring && mossnano__is_true(c->handshake, "demo"); }
int64_t mossnano_stream(const mossnano *c) { return c->plain.opened - 1; }

mossnano_position mossnano_played(const mossnano *c) {
    int64_t both = c->plain.played;
    mossnano_position position = {both / MOSSNANO_SAMPLES - 1, both % MOSSNANO_SAMPLES};
    return position;
}

static void mossnano__free_messages(mossnano__message *first) {
    for (mossnano__message *next; first; first = next) next = first->next, free(first);
}

/* The messages for some frames; NULL where there is no memory. */
static mossnano__message *mossnano__cut(mossnano_voice *v, const uint8_t *at, size_t frames, size_t frame_bytes) {
    size_t most = MOSSNANO_PIECE > frame_bytes ? MOSSNANO_PIECE / frame_bytes : 1;
    mossnano__message *first = NULL, **end = &first;
    do { /* once for no frames as well: an empty TOKENS too opens a stream, for its END */
        size_t piece = frames < most ? frames : most;
        *end = mossnano__make_message(v, MOSSNANO_TOKENS, at, piece * frame_bytes);
        if (!*end) break;
        end = &(*end)->next;
        frames -= piece;
        at += piece ? piece * frame_bytes : 0;
        if (!frames) return first;
    } while (true);
    mossnano__free_messages(first);
    return NULL;
}

/* With the gate; false: there is no room for it, and `why` says so. */
static bool mossnano__has_room(mossnano_voice *v, size_t bytes, size_t frames, char *why, size_t why_bytes) {
    mossnano *c = v->client;
    int64_t fed = (int64_t)(frames * (size_t)c->format.frame_bytes), ahead = 0;
    if (v->is_numbered) ahead = v->fed_bytes - v->written / v->channels / v->frame_samples * c->format.frame_bytes;
    snprintf(why, why_bytes, "%zu bytes wait for the process to take them, and %zu frames more were fed: "
             "%d bytes (4 MiB) are allowed, feed less or later", c->queued_bytes, frames, MOSSNANO_QUEUE);
    if (c->queued_bytes + bytes > MOSSNANO_QUEUE) return false;
    snprintf(why, why_bytes, "%lld bytes of frames wait to be decoded in this voice, and %zu frames more were fed: "
             "%d bytes are allowed, feed less or later", (long long)ahead, frames, MOSSNANO_VOICE_QUEUE);
    return !v->is_numbered || ahead + fed <= MOSSNANO_VOICE_QUEUE;
}

static bool mossnano__feed(mossnano_voice *v, const void *packed, size_t frames) {
    mossnano *c = v->client;
    if (c->state != MOSSNANO_READY) return false;
    size_t frame_bytes = (size_t)c->format.frame_bytes, wanted = 0;
    mossnano__message *first = NULL; /* a gigabyte is not copied to be refused */
    bool is_copied = frames <= MOSSNANO_QUEUE / frame_bytes;
    if (is_copied) first = mossnano__cut(v, (const uint8_t *)packed, frames, frame_bytes);
    for (mossnano__message *message = first; message; message = message->next) wanted += message->bytes;
    char text[200];
    mossnano__enter(c);
    bool is_ready = c->state == MOSSNANO_READY && (v->is_open || !v->is_numbered);
    bool has_room = mossnano__has_room(v, is_copied ? wanted : MOSSNANO_QUEUE + 1, frames, text, sizeof text);
    bool is_taken = is_ready && first && has_room;
    if (is_taken) {
        v->opened += !v->is_open;
        v->is_open = true;
        v->fed_bytes += (int64_t)(frames * frame_bytes);
        mossnano__enqueue(c, first);
    }
    mossnano__leave(c);
    if (is_taken) return true;
    mossnano__free_messages(first);
    if (!is_ready || !c->options.on_error) return false;
    if (!has_room) c->options.on_error(c->options.context, "queue_full", text, false);
    else c->options.on_error(c->options.context, "out_of_memory", "no memory for what was fed: feed less", false);
    return false;
}

static bool mossnano__feed_codes(mossnano_voice *v, const uint16_t *codes, size_t frames) {
    const mossnano *c = v->client;
    if (c->state != MOSSNANO_READY) return false;
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
    ok = ok && mossnano__feed(v, packed, frames);
    free(packed);
    return ok;
}

static bool mossnano__finish(mossnano_voice *v) {
    mossnano *c = v->client;
    mossnano__enter(c);
    bool is_ready = c->state == MOSSNANO_READY;
    mossnano__message *end = v->is_open ? mossnano__make_message(v, MOSSNANO_END, NULL, 0) : NULL;
    bool has_memory = end || !v->is_open;
    if (end) mossnano__enqueue(c, end);
    v->is_open = !has_memory;
    mossnano__leave(c);
    return is_ready && has_memory;
}

bool mossnano_feed(mossnano *c, const void *packed, size_t frames) { return mossnano__feed(&c->plain, packed, frames); }
bool mossnano_feed_codes(mossnano *c, const uint16_t *codes, size_t frames) { return mossnano__feed_codes(&c->plain, codes, frames); }
bool mossnano_finish(mossnano *c) { return mossnano__finish(&c->plain); }

bool mossnano_cancel(mossnano *c) {
    mossnano__enter(c);
    bool is_ready = c->state == MOSSNANO_READY;
    mossnano__drop_queued(c, &c->plain); /* what has not left never will */
    c->plain.is_open = false;
    c->opened_before_cancel = c->plain.opened;
    c->plain.cancels++; /* from here on the puller is silent and the reader drops, until the END of this one is back */
    c->cancel_is_due = is_ready;
    if (!is_ready) mossnano__answer_cancel(&c->plain, c->plain.opened, c->plain.cancels);
    mossnano__wake(c);
    mossnano__leave(c);
    return is_ready;
}

/* --- voices, as you call them ----------------------------------------------------------------------------------- */

int mossnano_max_streams(const mossnano *c) { return c->has_ring ? mossnano__number(c->handshake, "max_streams") : 0; }

static bool mossnano__refuse(char *error, size_t error_bytes, const char *why) { return snprintf(error, error_bytes, "%s", why), false; }

static bool mossnano__may_open(mossnano *c, const mossnano_voice_options *o, char *error, size_t error_bytes) {
    if (c->state != MOSSNANO_READY) return mossnano__refuse(error, error_bytes, "the client is not ready: see mossnano_state");
    if (mossnano_max_streams(c) < 1)
        return mossnano__refuse(error, error_bytes, "the process takes one stream at a time (its HANDSHAKE has no "
                                "max_streams): update it, start it without --max-streams 0, or feed the client itself");
    bool ok = o->prebuffer_ms >= 0 && o->prebuffer_ms <= 60000 && o->gain >= 0 && o->gain <= 100;
    ok = ok && o->priority >= -4 && o->priority <= 3 && o->ring_seconds >= 0 && o->ring_seconds <= 600;
    if (!ok) snprintf(error, error_bytes, "ring_seconds %g, prebuffer_ms %g, gain %g, priority %d: 0 to 600, 0 to 60,000, "
                      "0 to 100 and -4 to 3 are allowed", o->ring_seconds, o->prebuffer_ms, o->gain, o->priority);
    return ok;
}

static void mossnano__free_voice(mossnano_voice *v) {
    for (mossnano__passed *next; v->marks; v->marks = next) next = v->marks->next, free(v->marks);
    free(v->ring), free(v->last), free(v);
}

static mossnano_voice *mossnano__make_voice(mossnano *c, const mossnano_voice_options *o) { /* NULL: no memory */
    mossnano_voice *v = (mossnano_voice *)calloc(1, sizeof *v);
    if (!v) return NULL;
    int64_t rate = c->format.sample_rate, codec_rate = mossnano__number(c->handshake, "codec_sample_rate");
    int64_t chunk_frames = mossnano__number(c->handshake, "chunk_frames"); /* null, and so 0, where chunks may be cut */
    int64_t chunk = ((chunk_frames > 0 ? chunk_frames : 1) * c->format.frame_samples * rate) / (codec_rate > 0 ? codec_rate : rate) + 1;
    if (codec_rate > 0 && codec_rate != rate && chunk < rate / 10) chunk = rate / 10; /* resampling keeps up to 81 ms */
    int64_t least = (int64_t)(o->prebuffer_ms * (double)rate / 1000) + chunk; /* or the prebuffer could never fill */
    v->client = c;
    v->is_numbered = v->is_open = true;
    v->is_mono = o->is_mono;
    v->window = v->granted = (int64_t)((o->ring_seconds > 0 ? o->ring_seconds : 2) * (double)rate);
    if (v->window < least) v->window = v->granted = least;
    v->frame_samples = c->format.frame_samples * rate / (codec_rate > 0 ? codec_rate : rate);
    v->opened = v->begun = 1; /* its stream begins where its ring does */
    v->stream = -1;
    v->gain_is = (int64_t)(MOSSNANO_UNITY * (o->gain > 0 ? o->gain : 1));
    v->gain = (int)v->gain_is;
    if (mossnano__make_ring(v, v->window, o->fade_ms, o->prebuffer_ms) && v->frame_samples > 0) return v;
    mossnano__free_voice(v);
    return NULL;
}

mossnano_voice *mossnano_open(mossnano *c, const mossnano_voice_options *options, char *error, size_t error_bytes) {
    mossnano_voice_options usual;
    memset(&usual, 0, sizeof usual);
    if (!options) options = &usual;
    if (!mossnano__may_open(c, options, error, error_bytes)) return NULL;
    mossnano_voice *v = mossnano__make_voice(c, options);
    char settings[80];
    int bytes = snprintf(settings, sizeof settings, "{\"window_samples\":%lld,\"urgency\":%d}", v ? (long long)v->window : 0, 3 - options->priority);
    mossnano__enter(c);
    bool is_ready = c->state == MOSSNANO_READY;
    if (v) v->number = c->numbers_used; /* under the gate, as its first message: numbers only grow on their way */
    mossnano__message *first = v && is_ready ? mossnano__make_message(v, MOSSNANO_SETTINGS, settings, (size_t)bytes) : NULL;
    if (first) {
        c->numbers_used++;
        v->next = c->voices;
        c->voices = v;
        mossnano__enqueue(c, first);
    }
    mossnano__leave(c);
    if (first) return v;
    mossnano__refuse(error, error_bytes, is_ready ? "no memory for a voice: lower its ring_seconds" : "the process has just ended");
    if (v) mossnano__free_voice(v);
    return NULL;
}

bool mossnano_voice_feed(mossnano_voice *v, const void *packed, size_t frames) { return mossnano__feed(v, packed, frames); }
bool mossnano_voice_feed_codes(mossnano_voice *v, const uint16_t *codes, size_t frames) { return mossnano__feed_codes(v, codes, frames); }
bool mossnano_voice_finish(mossnano_voice *v) { return mossnano__finish(v) && !*mossnano_voice_reason(v); }

bool mossnano_voice_mark(mossnano_voice *v, const void *text, size_t bytes) {
    mossnano *c = v->client;
    char why[200];
    mossnano__message *mark = bytes < sizeof v->marks->mark.text ? mossnano__make_message(v, MOSSNANO_MARK, text, bytes) : NULL;
    if (!mark) return false;
    mossnano__enter(c);
    bool is_open = v->is_open;
    bool has_room = mossnano__has_room(v, mark->bytes, 0, why, sizeof why);
    bool is_taken = is_open && has_room && v->marks_out < MOSSNANO_MOST_MARKS;
    if (has_room) snprintf(why, sizeof why, "%d marks were not taken: take those that were played, or mark later", v->marks_out);
    if (is_taken) v->marks_out++, mossnano__enqueue(c, mark);
    mossnano__leave(c);
    if (is_taken) return true;
    free(mark);
    if (is_open && c->options.on_error) c->options.on_error(c->options.context, "queue_full", why, false);
    return false;
}

bool mossnano_voice_take_mark(mossnano_voice *v, mossnano_mark *out) {
    mossnano__enter(v->client);
    int64_t heard = mossnano_voice_played(v);
    bool is_all = v->has_end && v->cancels == 0 && v->taken == v->written; /* a mark may be behind the last sample */
    mossnano__passed *first = v->marks;
    bool is_played = first && (first->mark.sample < heard || (is_all && first->mark.sample == heard));
    if (is_played) {
        *out = first->mark;
        v->marks = first->next;
        if (!v->marks) v->marks_end = &v->marks;
        v->marks_out--;
        free(first);
    }
    mossnano__leave(v->client);
    return is_played;
}

static void mossnano__silence(mossnano_voice *v) { /* with the gate */
    mossnano *c = v->client;
    v->cancels++; /* for ever: its number is never used again */
    if (mossnano__is_over(v)) return;
    mossnano__drop_queued(c, v); /* if its first message is among them, there is no stream to cancel */
    mossnano__message *cancel = v->has_left ? mossnano__make_message(v, MOSSNANO_CANCEL, NULL, 0) : NULL;
    if (cancel) {
        cancel->voice = NULL;
        mossnano__message *behind = c->queue;
        if (!behind) c->queue_end = &c->queue;
        mossnano__message **end = c->queue_end;
        c->queue_end = &c->queue;
        mossnano__enqueue(c, cancel);
        cancel->next = behind;
        if (behind) c->queue_end = end;
    }
    mossnano__end_voice(v, "");
}

int64_t mossnano_voice_cancel(mossnano_voice *v) {
    mossnano__enter(v->client);
    mossnano__silence(v);
    mossnano__leave(v->client);
    return mossnano_voice_played(v);
}

void mossnano_voice_set_gain(mossnano_voice *v, double gain) {
    v->gain = (int)(MOSSNANO_UNITY * (gain > 100 ? 100 : gain > 0 ? gain : 0));
}

int64_t mossnano_voice_played(const mossnano_voice *v) { return v->played % MOSSNANO_SAMPLES; }
uint64_t mossnano_voice_underruns(const mossnano_voice *v) { return (uint64_t)v->underruns; }
const char *mossnano_voice_reason(const mossnano_voice *v) { return mossnano__is_over(v) ? v->reason : ""; }

void mossnano_voice_close(mossnano_voice *v) {
    if (!v) return;
    mossnano *c = v->client;
    mossnano__enter(c);
    mossnano__silence(v);
    mossnano__drop_queued(c, v);
    mossnano_voice **at = &c->voices;
    while (*at != v) at = &(*at)->next;
    *at = v->next;
    mossnano__leave(c);
    mossnano__free_voice(v);
}

/* --- the puller: without a lock against the reader -------------------------------------------------------------- */

static int64_t mossnano__least(int64_t a, int64_t b) { return a < b ? a : b; }

static void mossnano__take_beginnings(mossnano_voice *v, int64_t at) {
    for (; v->begun_heard < v->begun && v->begin_at[v->begun_heard % MOSSNANO_BEGINNINGS] <= at; v->begun_heard++) {
        v->is_fresh = true;
        v->next_stream = v->begin_stream[v->begun_heard % MOSSNANO_BEGINNINGS];
        v->is_gathering = v->prebuffer > 0;
    }
}

static bool mossnano__take_real(mossnano_voice *v, int64_t wanted, int64_t cut, int64_t over, int64_t end) { /* was the ring dry? */
    int64_t at = v->pull_at;
    bool is_cut = false; /* what follows is another stream, but this one's last sample is not its end */
    while (v->real < wanted) {
        is_cut = at == cut && cut != v->cut_heard && v->level + v->real > 0;
        if (at == cut) v->cut_heard = cut;
        if (is_cut) break;
        mossnano__take_beginnings(v, at);
        bool is_whole = over > at || cut > at; /* more of this stream does not come */
        bool is_gathered = !v->is_gathering || ((end - at >= v->prebuffer || is_whole) && end > at);
        int64_t next_begins = v->begun_heard < v->begun ? v->begin_at[v->begun_heard % MOSSNANO_BEGINNINGS] : end;
        int64_t until = mossnano__least(mossnano__least(end, next_begins), cut > at ? cut : end);
        int64_t more = is_gathered ? mossnano__least(wanted - v->real, (until - at) / v->channels) : 0;
        if (more <= 0) break;
        if (v->is_fresh && v->real == 0 && !v->was_cut) v->level = v->fade_samples;
        if (v->is_fresh) v->stream = v->next_stream, v->heard = 0;
        v->is_fresh = v->is_gathering = v->was_cut = false;
        v->real += more;
        v->heard += more;
        at += more * v->channels;
    }
    if (v->real == wanted) return false;
    v->is_complete = at == over || v->is_gathering; /* the stream ends here as it should, with its own last sample */
    bool fades_out = !v->is_complete && v->level + v->real > 0 && v->fade_samples > 0;
    if (fades_out) v->is_fading_out = v->was_cut = true, v->fades_dropped = false;
    bool is_dry = !v->is_gathering && !is_cut;
    v->is_gathering = v->prebuffer > 0;
    return is_dry;
}

static void mossnano__begin_pull(mossnano_voice *v, int64_t wanted) {
    bool was_sounding = v->is_sounding; /* asked before the ring is looked at: what it told of is in there */
    int64_t cut = v->cut_at, over = v->end_of_stream, end = v->written, taken = v->taken;
    int64_t number = v->cancels; /* asked after it: what lies before the end was fed before that CANCEL */
    bool is_cancelled = number != v->cancels_answered;
    int64_t dropped = is_cancelled ? end : (int64_t)v->drop_before;
    bool cuts = number != v->noticed_cancels && v->level > 0 && !v->is_fading_out;
    if (cuts) v->is_fading_out = v->was_cut = v->fades_dropped = true;
    v->noticed_cancels = number;

    v->real = 0;
    v->is_complete = false;
    v->pull_at = v->is_fading_out || taken > dropped ? taken : dropped;
    v->dropped_left = v->is_fading_out && v->fades_dropped && dropped > taken ? (dropped - taken) / v->channels : 0;
    if (!v->is_fading_out) { /* a fade-out is finished first */
        bool is_dry = mossnano__take_real(v, wanted, cut, over, end);
        if (is_dry && was_sounding && v->is_sounding && !is_cancelled) v->underruns++;
    }
    int64_t fade = v->is_fading_out ? mossnano__least(v->fade_samples, v->level + v->real) : 0;
    v->audible = mossnano__least(wanted, v->real + fade);
}

static int16_t *mossnano__at(mossnano_voice *v, int64_t sample) {
    return &v->ring[(v->pull_at + sample * v->channels) % v->capacity];
}

static int64_t mossnano__value(mossnano_voice *v, int64_t sample, int channel) {
    int64_t loud = v->level + sample + 1; /* of the fade-in */
    const int16_t *held = mossnano__at(v, sample);
    if (sample >= v->real) {
        int64_t from = v->dropped_left > 0 ? mossnano__least(sample, v->dropped_left - 1) : v->real - 1;
        loud = mossnano__least(v->fade_samples, v->level + v->real) - (sample - v->real) - 1;
        held = from < 0 ? v->last : mossnano__at(v, from);
    }
    return loud >= v->fade_samples ? held[channel] : held[channel] * loud / v->fade_samples;
}

static int16_t mossnano__amplified(const mossnano_voice *v, int64_t sample, int64_t value) {
    int64_t gain = v->gain_was + (v->gain_is - v->gain_was) * (sample + 1) / v->audible;
    value = value * gain / MOSSNANO_UNITY;
    return (int16_t)(value > INT16_MAX ? INT16_MAX : value < INT16_MIN ? INT16_MIN : value);
}

static void mossnano__give(mossnano_voice *v, int64_t sample, int16_t *out) {
    int64_t sum = 0;
    for (int channel = 0; channel < v->channels; channel++) {
        int64_t value = mossnano__value(v, sample, channel);
        sum += value;
        if (!v->is_mono) out[channel] = mossnano__amplified(v, sample, value);
    }
    if (v->is_mono) *out = mossnano__amplified(v, sample, sum / v->channels);
}

static void mossnano__end_pull(mossnano_voice *v) {
    int64_t given = v->real + mossnano__least(v->audible - v->real, v->dropped_left);
    if (given > 0) memcpy(v->last, mossnano__at(v, given - 1), (size_t)v->channels * sizeof *v->last);
    v->level = v->is_complete ? 0 : mossnano__least(v->fade_samples, v->level + v->real) - (v->audible - v->real);
    v->is_fading_out = v->is_fading_out && v->level > 0;
    v->played = (v->stream + 1) * MOSSNANO_SAMPLES + v->heard; /* one number, so that they belong together */
    v->taken = v->pull_at + given * v->channels; /* only now: until here the reader must not write over it */
}

size_t mossnano_voice_pull(mossnano_voice *v, int16_t *out, size_t samples) {
    size_t channels = v->is_mono ? 1 : (size_t)v->channels;
    v->gain_was = v->gain_is;
    v->gain_is = v->gain;
    mossnano__begin_pull(v, (int64_t)samples);
    for (int64_t i = 0; i < v->audible; i++) mossnano__give(v, i, out + (size_t)i * channels);
    memset(out + (size_t)v->audible * channels, 0, (samples - (size_t)v->audible) * channels * sizeof *out);
    mossnano__end_pull(v);
    return (size_t)v->real;
}

bool mossnano_voice_is_speaking(mossnano_voice *v) {
    bool more_comes = !mossnano__is_over(v); /* asked first: what came by then is in the ring */
    return more_comes || (v->taken < v->written && v->drop_before < v->written && !mossnano__is_cancelled(v));
}

size_t mossnano_pull(mossnano *c, int16_t *out, size_t samples) {
    return c->has_ring ? mossnano_voice_pull(&c->plain, out, samples) : 0;
}

bool mossnano_is_speaking(mossnano *c) { return mossnano_voice_is_speaking(&c->plain); }
uint64_t mossnano_underruns(mossnano *c) { return mossnano_voice_underruns(&c->plain); }

void mossnano_stop(mossnano *c) {
    if (!c) return;
    c->is_stopping = true;
    mossnano_cancel(c);
    mossnano__enter(c);
    for (mossnano_voice *v = c->voices; v; v = v->next) mossnano__silence(v);
    c->is_closing = true;
    mossnano__wake(c);
    mossnano__leave(c);
    for (int ms = 0; !c->is_over && ms < MOSSNANO_STOP_MS; ms += 2) mossnano__sleep_ms(2);
    if (!c->is_over) mossnano__kill(c);
    c->is_given_up = true;
    mossnano__join(c->reader);
    while (c->voices) mossnano_voice_close(c->voices);
    mossnano__unmake_gate(c);
    free(c->plain.ring), free(c->plain.last), free(c->handshake), free(c->message), free(c);
}
#endif
