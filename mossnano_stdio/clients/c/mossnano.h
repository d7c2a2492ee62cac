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
void mossnano_stop(mossnano *client);             /* ends the process; nothing of it is left. No pull may be
                                                     running, and no callback of ours may call this */

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

enum { MOSSNANO_HANDSHAKE = 0, MOSSNANO_AUDIO = 1, MOSSNANO_TOKENS = 4, MOSSNANO_ERROR = 5, MOSSNANO_END = 7, MOSSNANO_CANCEL = 8 };
enum { MOSSNANO_LONGEST = 1 << 20 };   /* no message of the process is longer */
enum { MOSSNANO_PIECE = 1 << 16 };     /* of what is fed in one message: CANCEL must not wait behind a long one */
enum { MOSSNANO_HEAD = 5 };            /* bytes of a message: its length and its kind */
enum { MOSSNANO_QUEUE = 4 << 20 };     /* of messages that the process has not taken yet */
enum { MOSSNANO_MARKS = 256 };         /* streams that may begin in the ring */
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
    size_t bytes;
} mossnano__message;

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
    bool stream_is_open, is_closing;
    bool has_process;              /* that may be killed: its number is still its own */
    mossnano_options options;
    mossnano_format format;
    bool fatal_was_said;           /* the reader's, as is `message` */
    bool start_fails;              /* with what goes wrong before the first HANDSHAKE: on_error is not told */
    char fault[2200], reason[2200]; /* what was said last; and what was, when it failed */
    uint8_t *message;
    int16_t *ring;                 /* values, not samples; indices only grow, `% capacity` says where they are */
    int64_t capacity, fade_samples, prebuffer; /* the last: values */
    mossnano__atomic_bool has_ring;
    mossnano__atomic_i64 written, taken, drop_before; /* moved by: reader, puller, reader */
    mossnano__atomic_i64 end_of_stream;               /* where the last stream that is over ended in the ring, */
    mossnano__atomic_i64 cut_at;                      /* and where the last one broke off that was lost */
    int64_t mark_at[MOSSNANO_MARKS];                  /* where in the ring a stream begins */
    int64_t mark_stream[MOSSNANO_MARKS];              /* and which */
    mossnano__atomic_i64 marks_written, marks_taken;  /* moved by: reader, puller */
    int64_t marked_stream;                            /* the reader's */
    mossnano__atomic_i64 opened, ended;               /* streams */
    mossnano__atomic_i64 cancels, cancels_answered;
    int64_t opened_before_cancel;  /* streams, at the last one; under the gate */
    mossnano__atomic_i64 underruns;
    mossnano__atomic_bool is_sounding;       /* PCM of a stream came, its END did not */
    mossnano__atomic_bool is_stopping, is_given_up; /* given up: killed, and not waited for any more */
    mossnano__atomic_bool is_late;                  /* to say HANDSHAKE: it was killed */
    mossnano__atomic_bool has_exited;               /* its stderr ends soon */
    mossnano__atomic_bool is_gone, is_over;         /* the process; and the reader, too */
    mossnano__atomic_int state, pid, restarts;
    int restarts_in_a_row;         /* the reader's */
    char *handshake, version[64];

    /* The puller's. A pull is `real` samples from `pull_at`, then a fade-out, then silence. */
    int64_t pull_at, real, audible; /* audible: samples, the real ones and the fade-out */
    int64_t dropped_left;          /* samples that a CANCEL dropped, and that its fade-out may still use */
    int64_t level;                 /* how loud we are, from 0 to fade_samples; less only in and after a fade */
    bool is_fading_out, was_cut, fades_dropped, is_complete;
    bool is_gathering, is_fresh;   /* fresh: nothing of the stream was given yet: no fade-in, unless we were cut off */
    int64_t noticed_cancels;
    int64_t next_stream, stream, heard; /* that is being given out, and how many samples of it were */
    mossnano__atomic_i64 played;   /* both, for other threads */
    int64_t cut_heard;             /* the last cut_at that we came to */
    int16_t *last;                 /* the last sample that was given: a fade-out holds it where nothing follows */
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
static void mossnano__wait(mossnano *c) { SleepConditionVariableSRW(&c->queue_changed, &c->gate, INFINITE, 0); }
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
static void mossnano__make_gate(mossnano *c) { pthread_mutex_init(&c->gate, NULL); pthread_cond_init(&c->queue_changed, NULL); }
static void mossnano__unmake_gate(mossnano *c) { pthread_mutex_destroy(&c->gate); pthread_cond_destroy(&c->queue_changed); }
static void mossnano__enter(mossnano *c) { pthread_mutex_lock(&c->gate); }
static void mossnano__leave(mossnano *c) { pthread_mutex_unlock(&c->gate); }
static void mossnano__wait(mossnano *c) { pthread_cond_wait(&c->queue_changed, &c->gate); }
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

static bool mossnano__make_ring(mossnano *c, const char *json) {
    mossnano_format *f = &c->format;
    double seconds = c->options.ring_seconds > 0 ? c->options.ring_seconds : 10;
    double fade_ms = c->options.fade_ms > 0 ? c->options.fade_ms : c->options.fade_ms < 0 ? 0 : 5;
    c->capacity = (int64_t)(seconds * f->sample_rate) * f->channels + f->max_audio_bytes / 2;
    c->capacity -= c->capacity % f->channels; /* whole samples: their channels lie side by side */
    c->fade_samples = (int64_t)(fade_ms * f->sample_rate / 1000);
    c->prebuffer = (int64_t)(c->options.prebuffer_ms * f->sample_rate / 1000) * f->channels;
    c->ring = (int16_t *)malloc((size_t)c->capacity * sizeof *c->ring);
    c->last = (int16_t *)calloc((size_t)f->channels, sizeof *c->last);
    c->handshake = (char *)malloc(strlen(json) + 1);
    if (c->handshake) strcpy(c->handshake, json);
    mossnano__text(json, "version", c->version, sizeof c->version);
    return c->ring && c->last && c->handshake;
}

static bool mossnano__shake_hands(mossnano *c, const char *json) {
    mossnano_format said, *f = &said;
    const char *keys[] = {"sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes", "max_audio_bytes"};
    int *numbers[] = {&f->sample_rate, &f->channels, &f->frame_samples, &f->quantizers, &f->codebook_size, &f->frame_bytes, &f->max_audio_bytes};
    bool ok = mossnano__number(json, "protocol") == 1 && !strncmp(mossnano__find(json, "direction"), "\"decode\"", 8);
    for (int i = 0; i < 7; i++) ok &= (*numbers[i] = mossnano__number(json, keys[i])) > 0;
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
        if (!mossnano__make_ring(c, json)) return mossnano__say(c, "out_of_memory", advice, true), false;
    }
    mossnano__enter(c);
    bool is_in_time = !c->is_late;
    if (is_in_time) c->has_ring = true;
    if (is_in_time) c->state = MOSSNANO_READY;
    mossnano__leave(c);
    return is_in_time;
}

static bool mossnano__is_cancelled(mossnano *c) { return c->cancels != c->cancels_answered; }

static void mossnano__mark(mossnano *c) { /* a stream begins here */
    while (c->marks_written - c->marks_taken == MOSSNANO_MARKS) {
        if (mossnano__is_cancelled(c) || c->is_stopping) return; /* nothing of it will be pulled */
        mossnano__sleep_ms(2);
    }
    c->marked_stream = c->ended;
    c->mark_at[c->marks_written % MOSSNANO_MARKS] = c->written;
    c->mark_stream[c->marks_written % MOSSNANO_MARKS] = c->marked_stream;
    c->marks_written++;
}

static void mossnano__push(mossnano *c, const uint8_t *pcm, int64_t values) {
    if (c->marked_stream != c->ended) mossnano__mark(c);
    for (int64_t i = 0; i < values && !mossnano__is_cancelled(c) && !c->is_stopping;) {
        int64_t at = c->written, room = c->capacity - (at - c->taken);
        if (!room) { mossnano__sleep_ms(2); continue; } /* asleep, not signalled: the puller must not touch a lock */
        int64_t end = at + (room < values - i ? room : values - i);
        for (; at < end; at++, i++) c->ring[at % c->capacity] = (int16_t)(pcm[2 * i] | pcm[2 * i + 1] << 8);
        c->written = end;
        c->is_sounding = true;
    }
}

static void mossnano__answer_cancel(mossnano *c, int64_t streams, int64_t number) { /* all that were open at it are over */
    c->ended = streams;
    if (mossnano__is_cancelled(c)) c->drop_before = (int64_t)c->written;
    c->cancels_answered = number;
}

static void mossnano__end(mossnano *c, const char *json) {
    c->end_of_stream = (int64_t)c->written;
    c->is_sounding = false;
    if (!mossnano__is_true(json, "cancelled")) {
        c->ended++;
        c->restarts_in_a_row = 0;
        return;
    }
    char echo[64], *rest; /* our CANCEL carried how many streams were open by then, and its number */
    mossnano__text(json, "echo", echo, sizeof echo);
    int64_t streams = strtoll(echo, &rest, 10);
    mossnano__answer_cancel(c, streams, strtoll(rest, NULL, 10));
}

static bool mossnano__take(mossnano *c, int kind, size_t bytes) {
    const char *json = (const char *)c->message; /* ends with a 0 */
    char code[64], text[2048];
    if (c->state == MOSSNANO_STARTING && kind == MOSSNANO_HANDSHAKE) return mossnano__shake_hands(c, json);
    if (kind == MOSSNANO_AUDIO && c->state == MOSSNANO_READY) mossnano__push(c, c->message, (int64_t)bytes / 2);
    if (kind == MOSSNANO_END) mossnano__end(c, json);
    if (kind == MOSSNANO_ERROR) {
        mossnano__text(json, "code", code, sizeof code);
        mossnano__text(json, "message", text, sizeof text);
        mossnano__say(c, code, text, mossnano__is_true(json, "fatal"));
    }
    return true;
}

static void mossnano__empty_queue(mossnano *c) { /* whoever calls this holds the gate */
    for (mossnano__message *next; c->queue; c->queue = next) {
        next = c->queue->next;
        c->queued_bytes -= c->queue->bytes;
        free(c->queue);
    }
    c->queue_end = &c->queue;
}

static bool mossnano__bury(mossnano *c, const char *code, const char *text) { /* is it to be started again? */
    char without[100] = "", again[sizeof c->fault + 160];
    bool is_restarted = mossnano__may_restart(c);
    mossnano__enter(c);
    int64_t first = c->ended > c->opened_before_cancel ? (int64_t)c->ended : c->opened_before_cancel; /* that is lost */
    int64_t last = c->opened - 1;
    mossnano__empty_queue(c);
    c->stream_is_open = c->cancel_is_due = c->is_sounding = c->has_process = false;
    c->pid = 0;
    c->cut_at = (int64_t)c->written; /* what came of its streams can still be pulled, and then fades out */
    mossnano__answer_cancel(c, c->opened, c->cancels);
    c->is_gone = true;
    const char *form = strcmp(code, "process_ended") ? "%s" : "%s (process_ended)";
    if (!c->fatal_was_said) snprintf(c->fault, sizeof c->fault, form, text);
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

static mossnano__message *mossnano__make_message(int kind, const void *payload, size_t bytes) { /* NULL: no memory */
    mossnano__message *message = (mossnano__message *)malloc(sizeof *message + MOSSNANO_HEAD + bytes);
    if (!message) return NULL;
    message->next = NULL;
    message->bytes = MOSSNANO_HEAD + bytes;
    uint8_t *head = (uint8_t *)(message + 1);
    mossnano__make_head(head, kind, bytes);
    if (bytes) memcpy(head + MOSSNANO_HEAD, payload, bytes);
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
    return message;
}

static size_t mossnano__make_cancel(mossnano *c, char *out, size_t room) { /* made when it leaves: it never lacks memory */
    int bytes = snprintf(out + MOSSNANO_HEAD, room - MOSSNANO_HEAD, "%lld %lld", (long long)c->opened_before_cancel,
                         (long long)c->cancels);
    mossnano__make_head((uint8_t *)out, MOSSNANO_CANCEL, (size_t)bytes);
    return MOSSNANO_HEAD + (size_t)bytes;
}

static bool mossnano__write_next(mossnano *c) { /* false: that was all */
    char cancel[64];
    size_t cancel_bytes = 0;
    mossnano__message *message = NULL;
    mossnano__enter(c);
    while (!c->queue && !c->cancel_is_due && !c->is_closing && !c->is_gone) mossnano__wait(c);
    if (c->cancel_is_due) cancel_bytes = mossnano__make_cancel(c, cancel, sizeof cancel);
    else if (c->queue) message = mossnano__take_from_queue(c);
    c->cancel_is_due = false;
    mossnano__leave(c);
    if (!message && !cancel_bytes) return false;
    if (!message) {
        mossnano__write(c, (uint8_t *)cancel, cancel_bytes);
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
    c->marked_stream = c->stream = -1;
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
int64_t mossnano_stream(const mossnano *c) { return c->opened - 1; }

mossnano_position mossnano_played(const mossnano *c) {
    int64_t both = c->played;
    mossnano_position position = {both / MOSSNANO_SAMPLES - 1, both % MOSSNANO_SAMPLES};
    return position;
}

/* The messages for some frames; NULL where there is no memory. */
static mossnano__message *mossnano__cut(const uint8_t *at, size_t frames, size_t frame_bytes) {
    size_t most = MOSSNANO_PIECE > frame_bytes ? MOSSNANO_PIECE / frame_bytes : 1;
    mossnano__message *first = NULL, **end = &first;
    do { /* once for no frames as well: an empty TOKENS too opens a stream, for its END */
        size_t piece = frames < most ? frames : most;
        *end = mossnano__make_message(MOSSNANO_TOKENS, at, piece * frame_bytes);
        if (!*end) break;
        end = &(*end)->next;
        frames -= piece;
        at += piece ? piece * frame_bytes : 0;
        if (!frames) return first;
    } while (true);
    for (mossnano__message *next; first; first = next) next = first->next, free(first);
    return NULL;
}

bool mossnano_feed(mossnano *c, const void *packed, size_t frames) {
    if (c->state != MOSSNANO_READY) return false;
    size_t frame_bytes = (size_t)c->format.frame_bytes, wanted = 0, waiting;
    mossnano__message *first = NULL; /* a gigabyte is not copied to be refused */
    if (frames <= MOSSNANO_QUEUE / frame_bytes) first = mossnano__cut((const uint8_t *)packed, frames, frame_bytes);
    for (mossnano__message *message = first; message; message = message->next) wanted += message->bytes;
    mossnano__enter(c);
    bool is_ready = c->state == MOSSNANO_READY;
    waiting = c->queued_bytes;
    bool is_taken = is_ready && first && waiting + wanted <= MOSSNANO_QUEUE;
    if (is_taken) {
        c->opened += !c->stream_is_open;
        c->stream_is_open = true;
        mossnano__enqueue(c, first);
    }
    mossnano__leave(c);
    if (is_taken) return true;
    bool has_memory = first || frames > MOSSNANO_QUEUE / frame_bytes;
    for (mossnano__message *next; first; first = next) next = first->next, free(first);
    char text[200];
    snprintf(text, sizeof text, "%zu bytes wait for the process to take them, and %zu frames more were fed: "
             "%d bytes (4 MiB) are allowed, feed less or later", waiting, frames, MOSSNANO_QUEUE);
    if (!is_ready || !c->options.on_error) return false;
    if (has_memory) c->options.on_error(c->options.context, "queue_full", text, false);
    else c->options.on_error(c->options.context, "out_of_memory", "no memory for what was fed: feed less", false);
    return false;
}

bool mossnano_feed_codes(mossnano *c, const uint16_t *codes, size_t frames) {
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
    ok = ok && mossnano_feed(c, packed, frames);
    free(packed);
    return ok;
}

bool mossnano_finish(mossnano *c) {
    mossnano__enter(c);
    bool is_ready = c->state == MOSSNANO_READY;
    mossnano__message *end = c->stream_is_open ? mossnano__make_message(MOSSNANO_END, NULL, 0) : NULL;
    bool has_memory = end || !c->stream_is_open;
    if (end) mossnano__enqueue(c, end);
    c->stream_is_open = !has_memory;
    mossnano__leave(c);
    return is_ready && has_memory;
}

bool mossnano_cancel(mossnano *c) {
    mossnano__enter(c);
    bool is_ready = c->state == MOSSNANO_READY;
    mossnano__empty_queue(c); /* what has not left never will */
    c->stream_is_open = false;
    c->opened_before_cancel = c->opened;
    c->cancels++; /* from here on the puller is silent and the reader drops, until the END of this one is back */
    c->cancel_is_due = is_ready;
    if (!is_ready) mossnano__answer_cancel(c, c->opened, c->cancels);
    mossnano__wake(c);
    mossnano__leave(c);
    return is_ready;
}

/* --- the puller: without a lock against the reader -------------------------------------------------------------- */

static int64_t mossnano__least(int64_t a, int64_t b) { return a < b ? a : b; }

static void mossnano__take_marks(mossnano *c, int64_t at) {
    for (; c->marks_taken < c->marks_written && c->mark_at[c->marks_taken % MOSSNANO_MARKS] <= at; c->marks_taken++) {
        c->is_fresh = true;
        c->next_stream = c->mark_stream[c->marks_taken % MOSSNANO_MARKS];
        c->is_gathering = c->prebuffer > 0;
    }
}

static bool mossnano__take_real(mossnano *c, int64_t wanted, int64_t cut, int64_t over, int64_t end) { /* was the ring dry? */
    int64_t at = c->pull_at;
    bool is_cut = false; /* what follows is another stream, but this one's last sample is not its end */
    while (c->real < wanted) {
        is_cut = at == cut && cut != c->cut_heard && c->level + c->real > 0;
        if (at == cut) c->cut_heard = cut;
        if (is_cut) break;
        mossnano__take_marks(c, at);
        bool is_whole = over > at || cut > at; /* more of this stream does not come */
        bool is_gathered = !c->is_gathering || ((end - at >= c->prebuffer || is_whole) && end > at);
        int64_t next_mark = c->marks_taken < c->marks_written ? c->mark_at[c->marks_taken % MOSSNANO_MARKS] : end;
        int64_t until = mossnano__least(mossnano__least(end, next_mark), cut > at ? cut : end);
        int64_t more = is_gathered ? mossnano__least(wanted - c->real, (until - at) / c->format.channels) : 0;
        if (more <= 0) break;
        if (c->is_fresh && c->real == 0 && !c->was_cut) c->level = c->fade_samples;
        if (c->is_fresh) c->stream = c->next_stream, c->heard = 0;
        c->is_fresh = c->is_gathering = c->was_cut = false;
        c->real += more;
        c->heard += more;
        at += more * c->format.channels;
    }
    if (c->real == wanted) return false;
    c->is_complete = at == over || c->is_gathering; /* the stream ends here as it should, with its own last sample */
    bool fades_out = !c->is_complete && c->level + c->real > 0 && c->fade_samples > 0;
    if (fades_out) c->is_fading_out = c->was_cut = true, c->fades_dropped = false;
    bool is_dry = !c->is_gathering && !is_cut;
    c->is_gathering = c->prebuffer > 0;
    return is_dry;
}

static void mossnano__begin_pull(mossnano *c, int64_t wanted) {
    bool was_sounding = c->is_sounding; /* asked before the ring is looked at: what it told of is in there */
    int64_t cut = c->cut_at, over = c->end_of_stream, end = c->written, taken = c->taken;
    int64_t number = c->cancels; /* asked after it: what lies before the end was fed before that CANCEL */
    bool is_cancelled = number != c->cancels_answered;
    int64_t dropped = is_cancelled ? end : (int64_t)c->drop_before;
    bool cuts = number != c->noticed_cancels && c->level > 0 && !c->is_fading_out;
    if (cuts) c->is_fading_out = c->was_cut = c->fades_dropped = true;
    c->noticed_cancels = number;

    c->real = 0;
    c->is_complete = false;
    c->pull_at = c->is_fading_out || taken > dropped ? taken : dropped;
    c->dropped_left = c->is_fading_out && c->fades_dropped && dropped > taken ? (dropped - taken) / c->format.channels : 0;
    if (!c->is_fading_out) { /* a fade-out is finished first */
        bool is_dry = mossnano__take_real(c, wanted, cut, over, end);
        if (is_dry && was_sounding && c->is_sounding && !is_cancelled) c->underruns++;
    }
    int64_t fade = c->is_fading_out ? mossnano__least(c->fade_samples, c->level + c->real) : 0;
    c->audible = mossnano__least(wanted, c->real + fade);
}

static int16_t *mossnano__at(mossnano *c, int64_t sample) {
    return &c->ring[(c->pull_at + sample * c->format.channels) % c->capacity];
}

static void mossnano__give(mossnano *c, int64_t sample, int16_t *out) {
    int64_t loud = c->level + sample + 1; /* of the fade-in */
    const int16_t *held = mossnano__at(c, sample);
    if (sample >= c->real) {
        int64_t from = c->dropped_left > 0 ? mossnano__least(sample, c->dropped_left - 1) : c->real - 1;
        loud = mossnano__least(c->fade_samples, c->level + c->real) - (sample - c->real) - 1;
        held = from < 0 ? c->last : mossnano__at(c, from);
    }
    for (int channel = 0; channel < c->format.channels; channel++)
        out[channel] = loud >= c->fade_samples ? held[channel] : (int16_t)(held[channel] * loud / c->fade_samples);
}

static void mossnano__end_pull(mossnano *c) {
    int64_t given = c->real + mossnano__least(c->audible - c->real, c->dropped_left);
    if (given > 0) memcpy(c->last, mossnano__at(c, given - 1), (size_t)c->format.channels * sizeof *c->last);
    c->level = c->is_complete ? 0 : mossnano__least(c->fade_samples, c->level + c->real) - (c->audible - c->real);
    c->is_fading_out = c->is_fading_out && c->level > 0;
    c->played = (c->stream + 1) * MOSSNANO_SAMPLES + c->heard; /* one number, so that they belong together */
    c->taken = c->pull_at + given * c->format.channels; /* only now: until here the reader must not write over it */
}

size_t mossnano_pull(mossnano *c, int16_t *out, size_t samples) {
    if (!c->has_ring) return 0;
    size_t channels = (size_t)c->format.channels;
    mossnano__begin_pull(c, (int64_t)samples);
    for (int64_t i = 0; i < c->audible; i++) mossnano__give(c, i, out + (size_t)i * channels);
    memset(out + (size_t)c->audible * channels, 0, (samples - (size_t)c->audible) * channels * sizeof *out);
    mossnano__end_pull(c);
    return (size_t)c->real;
}

bool mossnano_is_speaking(mossnano *c) {
    bool more_comes = !c->is_gone && c->ended < c->opened; /* asked first: what came by then is in the ring */
    return more_comes || (c->taken < c->written && c->drop_before < c->written && !mossnano__is_cancelled(c));
}

uint64_t mossnano_underruns(mossnano *c) { return (uint64_t)c->underruns; }

void mossnano_stop(mossnano *c) {
    if (!c) return;
    c->is_stopping = true;
    mossnano_cancel(c);
    mossnano__enter(c);
    c->is_closing = true;
    mossnano__wake(c);
    mossnano__leave(c);
    for (int ms = 0; !c->is_over && ms < MOSSNANO_STOP_MS; ms += 2) mossnano__sleep_ms(2);
    if (!c->is_over) mossnano__kill(c);
    c->is_given_up = true;
    mossnano__join(c->reader);
    mossnano__unmake_gate(c);
    free(c->ring), free(c->last), free(c->handshake), free(c->message), free(c);
}
#endif
