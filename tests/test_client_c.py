"""What the C client can do beyond what test_clients.py has every client do.

Each test is the body of a main, compiled with the client and given a decoder's command as `command`; it says lines.
"""

from __future__ import annotations

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
CLIENT = ROOT / "mossnano_stdio" / "clients" / "c"

PROGRAM = """
#define MOSSNANO_IMPLEMENTATION
#include "mossnano.h"
#include <stdarg.h>

static void say(const char *format, ...)
{
    char line[4096];
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    printf("%s\\n", line); /* one call: threads say too */
    fflush(stdout);
}

static void say_error(void *context, const char *code, const char *message, bool fatal)
{
    (void)context;
    say("error %s %d %s", code, fatal, message);
}

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

int main(int count, char **words)
{
    const char *const *command = (const char *const *)words + 1;
    (void)count, (void)say_error, (void)start, (void)hear, (void)load;
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
        kill(voice->process, SIGTERM);
        for (int ms = 0; voice->state != MOSSNANO_GONE && ms < 5000; ms += 2) mossnano__sleep_ms(2);
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
        mossnano *voice = start((mossnano_options){{.command = command, .on_error = say_error}});
        size_t bytes, frame_bytes = (size_t)mossnano_get_format(voice).frame_bytes;
        uint8_t *many = calloc(8000, frame_bytes), *tokens = load("{tmp_path / "tokens"}", &bytes);
        kill(voice->process, SIGSTOP);
        bool fed = mossnano_feed(voice, many, 8000), finished = mossnano_finish(voice);
        say("fed %d %d %d", fed, finished, mossnano_cancel(voice));
        int taken = 0;
        while (mossnano_feed(voice, many, 8000)) taken++;
        say("%d were taken, and then %d", taken, mossnano_finish(voice));
        for (int times = 0; times < 1000; times++) mossnano_cancel(voice);
        fed = mossnano_feed(voice, tokens, bytes / frame_bytes), finished = mossnano_finish(voice);
        say("fed %d %d %d", fed, finished, mossnano_is_speaking(voice));
        kill(voice->process, SIGCONT);
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
        pid_t process = voice->process;
        kill(process, SIGSTOP);
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
