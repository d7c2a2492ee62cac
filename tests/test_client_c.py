"""What the C client can do beyond what test_clients.py has every client do.

Each test is the body of a main, compiled with the client and given a decoder's command as `command`; it says lines.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mossnano_stdio.protocol import Kind, encode_message
from tests.child import DEMO, ROOT, run
from tests.doubles import NANO, some_frames, tokens_payload
from tests.test_clients import needs

STEADY = (sys.executable, ROOT / "tests" / "steady.py")
LOUD = 10_000  # its left channel
FADE = 240  # samples of 5 ms
CLIENT = ROOT / "mossnano_stdio" / "clients" / "c"

PROGRAM = """
#define MOSSNANO_IMPLEMENTATION
#include "mossnano.h"
#include <stdarg.h>

static void say(const char *format, ...)
{
    char line[8192];
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    printf("%s\\n", line); /* one call: threads say too */
    fflush(stdout);
}

static volatile int errors_said;

static void say_error(void *context, const char *code, const char *message, bool fatal)
{
    (void)context;
    say("error %s %d %s", code, fatal, message);
    errors_said++;
}

static void say_lost(void *context, int64_t first, int64_t last)
{
    (void)context;
    say("lost %d to %d", (int)first, (int)last);
}

static void say_line(void *context, const char *line) { (void)context, say("line %s", line); }

/* A minute is far more than anything here takes. */
#define UNTIL(condition) \\
    for (int waited = 0; !(condition); waited += 2) { if (waited > 60000) abort(); mossnano__sleep_ms(2); }

static mossnano *start(mossnano_options options)
{
    char error[2200];
    mossnano *voice = mossnano_start(&options, error, sizeof error);
    if (!voice) { say("not started %s", error); exit(1); }
    return voice;
}

/* Returns when it reads no more. */
static void hang(pid_t process)
{
    siginfo_t info;
    kill(process, SIGSTOP);
    waitid(P_PID, (id_t)process, &info, WSTOPPED);
}

/* All that is real until the voice is silent. */
static void hear(mossnano *voice, const char *path)
{
    FILE *heard = fopen(path, "wb");
    int16_t pcm[960];
    while (mossnano_is_speaking(voice)) {
        size_t samples = mossnano_pull(voice, pcm, 480);
        fwrite(pcm, 4, samples, heard);
        if (!samples) mossnano__sleep_ms(1);
    }
    fclose(heard);
}

static uint8_t *load(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    uint8_t *data = malloc(1 << 20);
    *bytes = fread(data, 1, 1 << 20, file);
    fclose(file);
    return data;
}

/* For tests/steady.py: a frame for so many samples. Returns when they may be pulled. */
static void feed_steady(mossnano *voice, uint32_t samples)
{
    int64_t before = voice->plain.written;
    mossnano_feed(voice, &samples, 1);
    UNTIL(voice->plain.written == before + 2 * samples && voice->plain.is_sounding);
}

static void finish_steady(mossnano *voice)
{
    int64_t before = voice->plain.ended;
    mossnano_finish(voice);
    UNTIL(voice->plain.ended > before);
}

static int pulled[1 << 20]; /* of the left channel */
static size_t pulled_samples;

static int pull_steady(mossnano *voice, size_t samples)
{
    static int16_t pcm[2 * 4096];
    memset(pcm, 0x55, sizeof pcm);
    size_t sound = mossnano_pull(voice, pcm, samples);
    for (size_t i = 0; i < samples; i++) {
        if (pcm[2 * i] != -pcm[2 * i + 1]) say("the channels differ");
        pulled[pulled_samples++] = pcm[2 * i];
    }
    return (int)sound;
}

static void say_pulled(void)
{
    printf("pulled %d", pulled[0]);
    for (size_t i = 1; i < pulled_samples; i++) printf(",%d", pulled[i]);
    printf("\\n");
}

static void say_position(mossnano *voice)
{
    mossnano_position played = mossnano_played(voice);
    say("at %d %d %d", (int)mossnano_stream(voice), (int)played.stream, (int)played.samples);
}

static int underruns(mossnano *voice) { return (int)mossnano_underruns(voice); }

int main(int count, char **words)
{
    const char *const *command = (const char *const *)words + 1;
    (void)count, (void)say_error, (void)say_lost, (void)say_line, (void)start, (void)hear, (void)load, (void)hang;
    (void)feed_steady, (void)finish_steady, (void)pull_steady, (void)say_pulled, (void)underruns;
    (void)say_position;
    BODY
    return 0;
}
"""


def build(folder: Path, script: str) -> Path:
    needs("gcc")
    source, built = folder / "program.c", folder / "program"
    source.write_text(PROGRAM.replace("BODY", script))
    flags = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", "-pthread", f"-I{CLIENT}"]
    subprocess.run(["gcc", *flags, source, "-o", built], check=True)
    return built


def play(folder: Path, script: str, command: Sequence[object] = DEMO) -> list[str]:
    """What the script said."""
    done = subprocess.run(
        [build(folder, script), *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout.splitlines()


def test_a_stream_to_which_nothing_was_fed_ends(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .on_error = say_error});
        mossnano_feed(voice, NULL, 0);
        say("speaking %d", mossnano_is_speaking(voice));
        mossnano_finish(voice);
        UNTIL(!mossnano_is_speaking(voice));
        mossnano_feed_codes(voice, NULL, 0);
        mossnano_finish(voice);
        UNTIL(!mossnano_is_speaking(voice));
        mossnano_finish(voice); /* nothing is open: nothing is to end */
        say("speaking %d", mossnano_is_speaking(voice));
        mossnano_stop(voice);
        """,
    )
    assert said == ["speaking 1", "speaking 0"]


CPP_HOST = """
#define MOSSNANO_IMPLEMENTATION
#include "mossnano.h"
#include <cstdio>
#include <vector>

int main(int, char **words)
{
    char error[2200];
    mossnano_options options = mossnano_options();
    options.command = words + 1;
    mossnano *voice = mossnano_start(&options, error, sizeof error);
    if (!voice) return std::puts(error), 1;
    std::vector<uint8_t> frames(5 * mossnano_get_format(voice).frame_bytes);
    mossnano_feed(voice, frames.data(), 5);
    mossnano_finish(voice);
    size_t heard = 0;
    for (int16_t pcm[960]; mossnano_is_speaking(voice); mossnano__sleep_ms(1)) heard += mossnano_pull(voice, pcm, 480);
    mossnano_stop(voice);
    std::printf("heard %zu\\n", heard);
}
"""


@pytest.mark.parametrize("standard", ["c++11", "c++17"])
def test_the_client_is_a_cpp_program_too(tmp_path: Path, standard: str) -> None:
    needs("g++")
    source, built = tmp_path / "host.cpp", tmp_path / "host"
    source.write_text(CPP_HOST)
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CLIENT}"]
    subprocess.run(["g++", *flags, source, "-o", built], check=True)
    done = run([str(built), *DEMO])
    assert done.stdout.decode() == f"heard {5 * NANO.frame_samples}\n", done.stderr.decode()


@pytest.mark.parametrize(
    "host",
    [
        "sigset_t all; sigfillset(&all); sigprocmask(SIG_BLOCK, &all, NULL);",
        "signal(SIGTERM, SIG_IGN);",
    ],
    ids=["blocks", "ignores"],
)
def test_a_process_hears_the_signals_that_its_host_does_not(tmp_path: Path, host: str) -> None:
    (said,) = play(
        tmp_path,
        host
        + """
        mossnano *voice = start((mossnano_options){.command = command, .on_error = say_error});
        kill(mossnano_pid(voice), SIGTERM);
        for (int ms = 0; !voice->is_over && ms < 30000; ms += 2) mossnano__sleep_ms(2);
        mossnano_stop(voice);
        """,
        STEADY,
    )
    assert said.startswith("error process_ended 1 the process ended by itself with status -15")


# Says which descriptors it was born with, and what they are; then it is a decoder.
BORN_WITH = """
import os, sys
path, *decoder = sys.argv[1:]
with open(path, "w") as report:
    for fd in range(20):
        if fd != report.fileno() and os.path.exists(f"/proc/self/fd/{fd}"):
            print(fd, os.readlink(f"/proc/self/fd/{fd}").split(":")[0], file=report)
os.execv(decoder[0], decoder)
"""


@pytest.mark.parametrize("closed", ["0", "2", "0, 2", "0, 1", "0, 1, 2"])
def test_a_host_without_standard_streams_is_understood(tmp_path: Path, closed: str) -> None:
    said = play(
        tmp_path,
        f"""
        int closed[] = {{{closed}}}, out = fcntl(1, F_DUPFD_CLOEXEC, 10);
        for (size_t i = 0; i < sizeof closed / sizeof *closed; i++) close(closed[i]);
        mossnano *voice = start((mossnano_options){{.command = command, .on_error = say_error}});
        bool are_ours = voice->input > 2 && voice->output > 2;
        are_ours &= fcntl(voice->input, F_GETFD) & FD_CLOEXEC && fcntl(voice->output, F_GETFD) & FD_CLOEXEC;
        mossnano_feed(voice, "\\x64\\0\\0", 1);
        mossnano_finish(voice);
        size_t heard = 0;
        int16_t pcm[200];
        UNTIL((heard += mossnano_pull(voice, pcm, 100), !mossnano_is_speaking(voice)));
        mossnano_stop(voice);
        dup2(out, 1);
        say("heard %zu, ours %d", heard, are_ours);
        """,
        [sys.executable, "-c", BORN_WITH, tmp_path / "fds", *STEADY],
    )
    assert said == ["heard 100, ours 1"]
    maybe_null = "/dev/null" if "2" in closed else "pipe"
    assert (tmp_path / "fds").read_text().splitlines() == ["0 pipe", "1 pipe", f"2 {maybe_null}"]


def test_a_process_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """Nothing waits for it, 4 MiB are kept for it, more are refused, and when it goes on, all is as it should be."""
    frames = tokens_payload(some_frames(30, NANO))
    (tmp_path / "tokens").write_bytes(frames)
    command = [*DEMO, "--chunk-frames", "4"]
    said = play(
        tmp_path,
        f"""
        mossnano *voice = start((mossnano_options){{.command = command, .on_error = say_error, .fade_ms = -1}});
        size_t bytes, frame_bytes = (size_t)mossnano_get_format(voice).frame_bytes;
        uint8_t *many = calloc(8000, frame_bytes), *tokens = load("{tmp_path / "tokens"}", &bytes);
        hang(mossnano_pid(voice));
        bool fed = mossnano_feed(voice, many, 8000), finished = mossnano_finish(voice);
        say("fed %d %d %d", fed, finished, mossnano_cancel(voice));
        int taken = 0;
        while (mossnano_feed(voice, many, 8000)) taken++;
        say("%d were taken, and then %d", taken, mossnano_finish(voice));
        for (int times = 0; times < 1000; times++) mossnano_cancel(voice);
        fed = mossnano_feed(voice, tokens, bytes / frame_bytes), finished = mossnano_finish(voice);
        say("fed %d %d %d", fed, finished, mossnano_is_speaking(voice));
        kill(mossnano_pid(voice), SIGCONT);
        hear(voice, "{tmp_path / "heard"}");
        mossnano_stop(voice);
        free(many), free(tokens);
        """,
        command,
    )
    first, refused, *rest = said
    assert first == "fed 1 1 1"
    assert refused.startswith("error queue_full 0 ")
    assert "4194304 bytes (4 MiB) are allowed" in refused
    taken, then = rest[0].split(maxsplit=1)
    assert 25 <= int(taken) <= 28, "of 160,015 bytes into 4 MiB; a pipe and a read may take 64 KiB each"
    assert [then, *rest[1:]] == ["were taken, and then 1", "fed 1 1 1"]
    wire = encode_message(Kind.TOKENS, frames) + encode_message(Kind.END)
    assert (tmp_path / "heard").read_bytes() == run([*command, "--output", "raw"], wire).stdout


def test_a_process_that_hangs_is_ended_by_stop(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .on_error = say_error});
        pid_t process = mossnano_pid(voice);
        hang(process);
        uint8_t *many = calloc(8000, 20);
        mossnano_feed(voice, many, 8000);
        mossnano_stop(voice);
        say("there %d", kill(process, 0) == 0);
        free(many);
        """,
    )
    assert said == ["there 0"]


def test_stop_waits_for_no_grandchild_that_holds_the_pipes(tmp_path: Path) -> None:
    """One in a session of its own, which the end of the process' group does not reach."""
    said = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .on_error = say_error});
        uint8_t *many = calloc(8000, 20);
        mossnano_feed(voice, many, 8000);
        time_t began = time(NULL);
        mossnano_stop(voice);
        say("soon %d", time(NULL) - began < 20);
        free(many);
        """,
        ["sh", "-c", f"exec 3<&0; setsid sleep 30 <&3 2>&- & exec {' '.join(map(str, STEADY))}"],
    )
    assert said == ["soon 1"]


def sounds(line: str) -> list[int]:
    return [int(value) for value in line.removeprefix("pulled ").split(",")]


def largest_step(values: list[int]) -> int:
    return max(abs(after - before) for before, after in itertools.pairwise(values))


def test_an_underrun_fades_out_and_what_follows_fades_in(tmp_path: Path) -> None:
    *said, line = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .on_error = say_error});
        feed_steady(voice, 1000);
        for (int times = 0; times < 2; times++) {
            int first = pull_steady(voice, times ? 64 : 900), second = pull_steady(voice, times ? 64 : 300);
            say("%d %d underruns %d", first, second, underruns(voice));
        }
        feed_steady(voice, 1000);
        for (int times = 0; times < 10; times++) pull_steady(voice, 100);
        finish_steady(voice);
        say("%d speaking %d", pull_steady(voice, 10), mossnano_is_speaking(voice));
        say_pulled();
        mossnano_stop(voice);
        """,
        STEADY,
    )
    assert said == ["900 100 underruns 1", "0 0 underruns 2", "0 speaking 0"]
    sound = sounds(line)
    assert sound[:1000] == [LOUD] * 1000
    assert sound[999 + FADE : 1328] == [0] * (329 - FADE)
    rising = sound[1328 : 1328 + FADE]
    assert rising == sorted(rising)
    assert sound[1328 + FADE - 1 : 2328] == [LOUD] * (1001 - FADE), "no sample is lost"
    assert sound[2328:] == [0] * 10, "the stream ends as it is"
    assert largest_step(sound[:2328]) <= LOUD / FADE + 1


@pytest.mark.parametrize("waiting", [40, 5000], ids=["less than a fade", "more than a fade"])
@pytest.mark.parametrize("size", [64, 480], ids=["small pulls", "a large pull"])
def test_cancel_fades_out_what_is_heard_and_what_follows_fades_in(tmp_path: Path, waiting: int, size: int) -> None:
    *said, line = play(
        tmp_path,
        f"""
        mossnano *voice = start((mossnano_options){{.command = command, .on_error = say_error}});
        feed_steady(voice, 480 + {waiting});
        pull_steady(voice, 480);
        mossnano_cancel(voice);
        for (int at = 0; at < 480; at += {size}) say("%d", pull_steady(voice, {size}));
        UNTIL(voice->plain.cancels_answered == 1);
        feed_steady(voice, 1000);
        finish_steady(voice);
        while (mossnano_is_speaking(voice)) say("%d", pull_steady(voice, 1000));
        say_pulled();
        mossnano_stop(voice);
        """,
        STEADY,
    )
    pulls = -(-480 // size)
    assert said == [*["0"] * pulls, "1000"], "a fade counts for nothing"
    sound = sounds(line)
    silent_from, next_from = 479 + FADE, 480 + pulls * size
    assert sound[:480] == [LOUD] * 480
    assert sound[480:silent_from] == sorted(sound[480:silent_from], reverse=True)
    assert sound[silent_from:next_from] == [0] * (next_from - silent_from)
    assert sound[next_from + FADE - 1 :] == [LOUD] * (1001 - FADE)
    assert largest_step(sound) <= LOUD / FADE + 1


def test_a_negative_fade_leaves_every_sample_as_it_came(tmp_path: Path) -> None:
    *_, line = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .fade_ms = -1});
        feed_steady(voice, 100);
        pull_steady(voice, 150); /* an underrun */
        feed_steady(voice, 200);
        pull_steady(voice, 100);
        mossnano_cancel(voice);
        pull_steady(voice, 100);
        say_pulled();
        mossnano_stop(voice);
        """,
        STEADY,
    )
    assert sounds(line) == [LOUD] * 100 + [0] * 50 + [LOUD] * 100 + [0] * 100


def test_a_stream_that_ends_by_itself_is_not_faded(tmp_path: Path) -> None:
    *said, line = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .on_error = say_error});
        for (int stream = 0; stream < 2; stream++) {
            feed_steady(voice, 100);
            finish_steady(voice);
        }
        int first = pull_steady(voice, 250), second = pull_steady(voice, 10);
        say("%d %d underruns %d", first, second, underruns(voice));
        mossnano_cancel(voice);
        pull_steady(voice, 10);
        say_pulled();
        mossnano_stop(voice);
        """,
        STEADY,
    )
    assert said == ["200 0 underruns 0"]
    assert sounds(line) == [LOUD] * 200 + [0] * 70


def test_a_prebuffer_is_gathered_before_a_stream_and_after_an_underrun(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        """
        mossnano_options options = {.command = command, .on_error = say_error, .prebuffer_ms = 10, .fade_ms = -1};
        mossnano *voice = start(options);
        feed_steady(voice, 479);
        say("gathering %d", pull_steady(voice, 100));
        feed_steady(voice, 1);
        say("gathered %d", pull_steady(voice, 100));
        say("and %d", pull_steady(voice, 400));
        say("underruns %d", underruns(voice));
        feed_steady(voice, 479);
        say("gathering %d", pull_steady(voice, 100));
        finish_steady(voice);
        feed_steady(voice, 100);
        say("all there is %d", pull_steady(voice, 500));
        say("and not the next %d", pull_steady(voice, 1));
        feed_steady(voice, 380);
        say("the next %d", pull_steady(voice, 500));
        say("underruns %d", underruns(voice));
        mossnano_cancel(voice);
        UNTIL(voice->plain.cancels_answered == 1);
        feed_steady(voice, 100);
        say("gathering %d", pull_steady(voice, 10));
        finish_steady(voice);
        say("short %d", pull_steady(voice, 100));
        say("speaking %d", mossnano_is_speaking(voice));
        mossnano_stop(voice);

        char error[300];
        options.prebuffer_ms = 10001;
        if (!mossnano_start(&options, error, sizeof error)) say("%s", error);
        """,
        STEADY,
    )
    assert said == [
        "gathering 0",
        "gathered 100",
        "and 380",
        "underruns 1",
        "gathering 0",
        "all there is 479",
        "and not the next 0",
        "the next 480",
        "underruns 2",
        "gathering 0",
        "short 100",
        "speaking 0",
        "prebuffer_ms 10001: 0 or more, and it must fit into the ring of 10000 ms (see ring_seconds)",
    ]


@pytest.mark.parametrize(("prebuffer", "has_underruns"), [(0, 1), (160, 0)])
def test_jitter_that_a_prebuffer_covers_costs_no_underrun(tmp_path: Path, prebuffer: int, has_underruns: int) -> None:
    """Fed as it is heard, 80 ms at a time, with up to 80 ms of jitter: the clock is that of the pulls."""
    said = play(
        tmp_path,
        f"""
        mossnano *voice = start((mossnano_options){{
            .command = command, .on_error = say_error, .prebuffer_ms = {prebuffer}}});
        int frames = 0;
        double due = 0;
        srand(1);
        for (int ms = 0; ms < 4000; ms += 10) {{
            for (; ms >= due; due = 80 * frames + 10 + 70 * (double)rand() / RAND_MAX) {{
                feed_steady(voice, 3840);
                frames++;
            }}
            pull_steady(voice, 480);
        }}
        say("%d", underruns(voice) > 0);
        mossnano_stop(voice);
        """,
        STEADY,
    )
    assert said == [str(has_underruns)]


def test_a_launch_returns_at_once_and_its_state_says_how_it_goes(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        f"""
        char error[200];
        mossnano_options options = {{.command = command, .on_error = say_error}};
        mossnano *voice = mossnano_launch(&options, error, sizeof error);
        say("starting %d '%s'", mossnano_state(voice) == MOSSNANO_STARTING, mossnano_reason(voice));
        uint16_t codes[4] = {{0}};
        say("fed %d %d", mossnano_feed(voice, codes, 1), mossnano_feed_codes(voice, codes, 1));
        say("finished %d", mossnano_finish(voice));
        say("cancelled %d", mossnano_cancel(voice));
        int16_t pcm[2] = {{7, 8}};
        size_t pulled = mossnano_pull(voice, pcm, 1);
        say("%zu %d %d %d", pulled, pcm[0], mossnano_is_speaking(voice), mossnano_get_format(voice).channels);
        fclose(fopen("{tmp_path / "go"}", "w"));
        UNTIL(mossnano_state(voice) != MOSSNANO_STARTING);
        say("ready %d, channels %d", mossnano_state(voice) == MOSSNANO_READY, mossnano_get_format(voice).channels);
        feed_steady(voice, 100);
        say("pulled %d", pull_steady(voice, 50));
        mossnano_feed(voice, "\\0\\0\\0", 1);
        UNTIL(voice->is_over);
        say("failed %d %s", mossnano_state(voice) == MOSSNANO_FAILED, mossnano_reason(voice));
        mossnano_stop(voice);
        """,
        [
            "sh",
            "-c",
            f'until [ -e "$0" ]; do sleep 0.05; done; exec "{STEADY[0]}" "{STEADY[1]}"',
            tmp_path / "go",
        ],
    )
    reason = "the process ended by itself with status 3: its stderr says more"
    assert said == [
        "starting 1 ''",
        "fed 0 0",
        "finished 0",
        "cancelled 0",
        "0 7 0 0",
        "ready 1, channels 2",
        "pulled 50",
        f"error process_ended 1 {reason}",
        f"failed 1 {reason} (process_ended)",
    ]


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        (["no-such-decoder"], "not_started", "no-such-decoder cannot be started"),
        ([*DEMO[:-1], "nowhere"], "bad_weights", "nowhere"),
        (["true"], "process_ended", "status 0: its stderr says more (process_ended)"),
        (["sleep", "600"], "timeout", "no HANDSHAKE in time: allow more start_seconds"),
        (["sh", "-c", "setsid sleep 60 2>&-"], "timeout", "no HANDSHAKE in time: allow more start_seconds"),
    ],
    ids=["no program", "no weights", "no decoder", "no answer", "no answer and out of reach"],
)
def test_a_launch_that_fails_tells_why(tmp_path: Path, command: list[str], code: str, reason: str) -> None:
    said, failed, not_started = play(
        tmp_path,
        f"""
        char error[2200];
        mossnano_options options = {{
            .command = command, .on_error = say_error, .start_seconds = {0.5 if code == "timeout" else 60}}};
        mossnano *voice = mossnano_launch(&options, error, sizeof error);
        UNTIL(voice->is_over);
        say("failed %d %s", mossnano_state(voice) == MOSSNANO_FAILED, mossnano_reason(voice));
        mossnano_stop(voice);
        mossnano_start(&options, error, sizeof error); /* says the same, and on_error hears nothing */
        say("%s", error);
        """,
        command,
    )
    assert said.startswith(f"error {code} 1 ")
    assert failed.startswith("failed 1 ")
    assert reason in failed
    assert not_started == failed.removeprefix("failed 1 ")


def test_stop_ends_a_launch(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        """
        char error[200];
        mossnano_options options = {.command = command, .on_error = say_error};
        mossnano *voice = mossnano_launch(&options, error, sizeof error);
        UNTIL(mossnano_pid(voice) > 0);
        pid_t process = mossnano_pid(voice);
        mossnano_stop(voice);
        say("there %d", kill(process, 0) == 0);
        mossnano_stop(mossnano_launch(&options, error, sizeof error)); /* at once */
        """,
        ["sleep", "600"],
    )
    assert said == ["there 0"]


def test_it_is_known_which_process_it_is_and_what_it_says(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        """
        char error[200];
        mossnano_options options = {.command = command, .on_log = say_line};
        mossnano *voice = mossnano_launch(&options, error, sizeof error);
        say("before '%s' '%s' %d", mossnano_version(voice), mossnano_handshake(voice), mossnano_is_demo(voice));
        UNTIL(mossnano_state(voice) == MOSSNANO_READY);
        int pid = mossnano_pid(voice);
        say("it is there %d", pid > 0 && kill(pid, 0) == 0);
        say("version %s, demo %d", mossnano_version(voice), mossnano_is_demo(voice));
        say("%s", mossnano_handshake(voice));
        mossnano_feed(voice, "\\0\\0\\0", 1);
        UNTIL(voice->is_over);
        say("it is gone %d", mossnano_pid(voice));
        mossnano_stop(voice);
        """,
        STEADY,
    )
    assert [line for line in said if line.startswith("line")] == [
        "line loading",
        "line dying: grün",
        "line without a last line",
    ]
    before, there, version, handshake, gone = (line for line in said if not line.startswith("line"))
    assert before == "before '' '' 0"
    assert there == "it is there 1"
    assert version == "version 1.2, demo 1"
    assert json.loads(handshake)["name"] == "steady"
    assert gone == "it is gone 0"


def test_a_long_line_comes_in_pieces(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .on_log = say_line});
        mossnano_stop(voice);
        """,
        ["sh", "-c", f"printf '%05000d\\nshort\\n' 7 >&2; exec {' '.join(map(str, STEADY))}"],
    )
    assert "".join(said[:2]).count("0") == 4999
    assert said[1].endswith("07")
    assert said[2:4] == ["line short", "line loading"]


def test_an_end_that_a_fatal_error_brings_is_no_end(tmp_path: Path) -> None:
    """It says how much was sent, which is less than all. So it ends no row of restarts either."""
    said = play(
        tmp_path,
        """
        static const uint8_t zeros[400];
        mossnano *voice = start((mossnano_options){
            .command = command, .restart = 1, .on_lost = say_lost, .on_error = say_error});
        for (int restarts = 1; restarts <= 2; restarts++) {
            mossnano_feed(voice, zeros, 1);
            mossnano_feed(voice, zeros, 20);
            UNTIL(voice->is_over || (mossnano_restarts(voice) == restarts && mossnano_state(voice) == MOSSNANO_READY));
        }
        say("restarts %d", mossnano_restarts(voice));
        mossnano_stop(voice);
        """,
        [*DEMO, "--max-message-bytes", "300"],
    )
    assert [" ".join(line.split()[:3]) for line in said] == [
        "error framing_lost 0",
        "lost 0 to",
        "error process_ended 0",
        "error framing_lost 1",
        "lost 1 to",
        "restarts 1",
    ]


def test_a_crash_is_survived_and_what_was_fed_is_reported_lost(tmp_path: Path) -> None:
    *said, line, lost, last_error = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){
            .command = command, .restart = 1, .on_lost = say_lost, .on_error = say_error});
        int before = mossnano_pid(voice);
        feed_steady(voice, 100); /* stream 0 is heard to its end */
        finish_steady(voice);
        pull_steady(voice, 100);
        feed_steady(voice, 500); /* stream 1 is cut */
        hang(mossnano_pid(voice));
        mossnano_feed(voice, "\\0\\0\\0", 1);
        mossnano_finish(voice);
        mossnano_feed(voice, "\\7\\0\\0", 1); /* stream 2 is not even begun */
        kill(mossnano_pid(voice), SIGCONT);
        UNTIL(mossnano_restarts(voice) == 1 && mossnano_state(voice) == MOSSNANO_READY);
        say("again %d %d", mossnano_pid(voice) != before, mossnano_is_speaking(voice));
        feed_steady(voice, 300); /* stream 3 lies behind what is left of stream 1 */
        finish_steady(voice);
        for (int pull = 0; pull < 3; pull++) {
            say("%d", pull_steady(voice, pull == 0 ? 500 : pull == 1 ? 240 : 300));
            say_position(voice);
        }
        say("speaking %d, underruns %d", mossnano_is_speaking(voice), underruns(voice));
        mossnano_feed(voice, "\\0\\0\\0", 1); /* a stream came to its end: it may be started again */
        UNTIL(mossnano_restarts(voice) == 2 && mossnano_state(voice) == MOSSNANO_READY);
        say_pulled();
        mossnano_feed(voice, "\\0\\0\\0", 1); /* none did */
        UNTIL(voice->is_over);
        mossnano_stop(voice);
        """,
        STEADY,
    )
    crash = "the process ended by itself with status 3: its stderr says more"
    again = "it is started again, without what was fed to the streams"
    assert said == [
        "lost 1 to 2",
        f"error process_ended 0 {crash}; {again} 1 to 2",
        "again 1 1",
        "500",
        "at 3 1 500",
        "0",
        "at 3 1 500",
        "300",
        "at 3 3 300",
        "speaking 0, underruns 0",
        "lost 4 to 4",
        f"error process_ended 0 {crash}; {again} 4 to 4",
    ]
    assert lost == "lost 5 to 5"
    assert last_error == f"error process_ended 1 {crash}"
    sound = sounds(line)
    assert sound[:600] == [LOUD] * 600
    assert sound[599 + FADE] == 0
    assert sound[600 + FADE + FADE :] == [LOUD] * (300 - FADE)
    assert largest_step(sound) <= LOUD / FADE + 1


def test_stop_ends_a_process_that_is_to_be_started_again(tmp_path: Path) -> None:
    """While it waits to do so, and while a fed process hangs in a voice that may restart it."""
    said = play(
        tmp_path,
        """
        mossnano_options options = {.command = command, .restart = 100, .on_error = say_error};
        mossnano *voice = start(options);
        mossnano_feed(voice, "\\0\\0\\0", 1);
        UNTIL(mossnano_pid(voice) == 0 && errors_said); /* stopped before that, it says nothing more */
        mossnano_stop(voice);
        voice = start(options);
        pid_t process = mossnano_pid(voice);
        hang(process);
        mossnano_stop(voice);
        say("there %d", kill(process, 0) == 0);
        """,
        STEADY,
    )
    assert len(said) == 2
    assert said[0].startswith("error process_ended 0 ")
    assert said[1] == "there 0"


def test_other_weights_after_a_crash_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(STEADY[1].read_text().replace('"sample_rate": 48000', '"sample_rate": 24000'))
    said = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .restart = 1, .on_error = say_error});
        mossnano_feed(voice, "\\0\\0\\0", 1);
        UNTIL(voice->is_over);
        say("%s", mossnano_reason(voice));
        mossnano_stop(voice);
        """,
        ["sh", "-c", 'mkdir "$0" && exec "$1" "$2" || exec "$1" "$3"', tmp_path / "was", STEADY[0], STEADY[1], other],
    )
    change = "sample_rate was 48000 and is now 24000: start a new voice for other weights"
    assert said[1:] == [f"error handshake 1 {change}", f"{change} (handshake)"]


def test_played_says_how_much_of_which_stream_was_given_out(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        """
        mossnano *voice = start((mossnano_options){.command = command, .on_error = say_error});
        say_position(voice);
        feed_steady(voice, 100);
        finish_steady(voice);
        pull_steady(voice, 50);
        say_position(voice);
        feed_steady(voice, 1000);
        pull_steady(voice, 350);
        say_position(voice);
        mossnano_cancel(voice);
        pull_steady(voice, 480);
        say_position(voice);
        UNTIL(voice->plain.cancels_answered == 1);
        feed_steady(voice, 10);
        say_position(voice);
        pull_steady(voice, 1);
        say_position(voice);
        mossnano_stop(voice);
        """,
        STEADY,
    )
    assert said == ["at -1 -1 0", "at 0 0 50", "at 1 1 300", "at 1 1 300", "at 2 1 300", "at 2 2 1"]
