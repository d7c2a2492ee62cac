"""What the C# client can do beyond what test_clients.py has every client do.

Each test is the body of a Main, compiled against the client and given a decoder's command as `command`; it says lines.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mossnano_stdio.protocol.messages import Kind, encode_message
from tests.child import DEMO, ROOT, run
from tests.doubles import NANO, some_frames, tokens_payload

STEADY = (sys.executable, ROOT / "tests" / "steady.py")
LOUD = 10_000  # its left channel
FADE = 240  # samples of 5 ms
CLIENT = ROOT / "mossnano_stdio" / "clients" / "csharp" / "Mossnano.cs"

PROGRAM = """
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Reflection;
using System.Text;
using System.Threading;

static class Program
{
    static readonly object saying = new object();

    static void Say(params object[] words) { lock (saying) Console.WriteLine(string.Join(" ", words)); }

    static void SayError(string code, string message, bool fatal) { Say("error", code, fatal, message); }

    static void Until(Func<bool> condition) // a minute is far more than anything here takes
    {
        for (int waited = 0; !condition(); waited += 2)
        {
            if (waited > 60000) throw new TimeoutException();
            Thread.Sleep(2);
        }
    }

    static void SayLost(long[] streams) { Say("lost", string.Join(",", streams)); }

    static void Signal(string name, Mossnano voice)
    {
        using (Process kill = Process.Start("kill", "-" + name + " " + voice.Pid)) kill.WaitForExit();
        string threads = "/proc/" + voice.Pid + "/task";
        Func<string, bool> stands = thread => File.ReadAllText(thread + "/stat").Contains(") T ");
        if (name == "STOP") Until(() => Directory.GetDirectories(threads).All(stands));
    }

    static T Inside<T>(Mossnano voice, string field)
    {
        BindingFlags hidden = BindingFlags.Instance | BindingFlags.NonPublic;
        FieldInfo own = typeof(Mossnano).GetField(field, hidden);
        if (own != null) return (T)own.GetValue(voice);
        object plain = typeof(Mossnano).GetField("plain", hidden).GetValue(voice); // what the client says itself
        return (T)typeof(MossnanoVoice).GetField(field, hidden).GetValue(plain);
    }

    // For tests/steady.py: a frame for so many samples. Returns when they may be pulled.
    static void FeedSteady(Mossnano voice, int samples)
    {
        long before = Inside<long>(voice, "written");
        voice.Feed(BitConverter.GetBytes(samples));
        Until(() => Inside<long>(voice, "written") == before + 2 * samples && Inside<bool>(voice, "isSounding"));
    }

    static void FinishSteady(Mossnano voice)
    {
        long before = Inside<long>(voice, "ended");
        voice.Finish();
        Until(() => Inside<long>(voice, "ended") > before);
    }

    static readonly List<int> pulled = new List<int>(); // of the left channel

    static int PullSteady(Mossnano voice, int samples)
    {
        var pcm = new short[2 * samples];
        int sound = voice.Pull(pcm);
        for (int i = 0; i < samples; i++)
        {
            if (pcm[2 * i] != -pcm[2 * i + 1]) Say("the channels differ");
            pulled.Add(pcm[2 * i]);
        }
        return sound;
    }

    static void SayPulled() { Say("pulled", string.Join(",", pulled)); }

    // All that is real until the voice is silent.
    static byte[] Hear(Mossnano voice)
    {
        var heard = new MemoryStream();
        var pcm = new short[960];
        var bytes = new byte[1920];
        Until(() =>
        {
            int samples;
            while ((samples = voice.Pull(pcm)) > 0)
            {
                Buffer.BlockCopy(pcm, 0, bytes, 0, 4 * samples);
                heard.Write(bytes, 0, 4 * samples);
            }
            return !voice.IsSpeaking;
        });
        return heard.ToArray();
    }

    static void Main(string[] command)
    {
        %s
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(CLIENT, tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def library_for_net_framework(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """There, ProcessStartInfo has no StandardInputEncoding."""
    folder = tmp_path_factory.mktemp("library")
    source = CLIENT.read_text()
    assert '"StandardInputEncoding"' in source
    (folder / CLIENT.name).write_text(source.replace('"StandardInputEncoding"', '"NotThere"'))
    return compile_library(folder / CLIENT.name, folder)


def compile_library(source: Path, folder: Path) -> Path:
    for program in ("mcs", "mono"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    built = folder / "Mossnano.dll"
    subprocess.run(["mcs", "-warnaserror", "-warn:4", "-t:library", f"-out:{built}", source], check=True)
    return built


def play(library: Path, script: str, command: Sequence[object] = DEMO) -> list[str]:
    """What the script said."""
    source, built = library.with_name("Program.cs"), library.with_name("Program.exe")
    source.write_text(PROGRAM % script)
    subprocess.run(["mcs", f"-r:{library}", f"-out:{built}", source], check=True)
    done = subprocess.run(
        ["mono", "--debug", built, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_stream_to_which_nothing_was_fed_ends(library: Path) -> None:
    said = play(
        library,
        """
        using (var voice = Mossnano.Start(command, SayError))
        {
            voice.Feed(new byte[0]);
            Say("speaking", voice.IsSpeaking);
            voice.Finish();
            Until(() => !voice.IsSpeaking);
            voice.FeedCodes(new int[0]);
            voice.Finish();
            Until(() => !voice.IsSpeaking);
            voice.Finish(); // nothing is open: nothing is to end
            Say("speaking", voice.IsSpeaking);
        }
        """,
    )
    assert said == ["speaking True", "speaking False"]


@pytest.mark.parametrize("encoding", ["Encoding.UTF8", "Encoding.GetEncoding(65001)", "Encoding.Unicode"])
@pytest.mark.parametrize("runtime", ["library", "library_for_net_framework"])
def test_the_hosts_console_encoding_adds_nothing_to_what_is_sent(
    request: pytest.FixtureRequest, runtime: str, encoding: str
) -> None:
    said = play(
        request.getfixturevalue(runtime),
        f"""
        Console.InputEncoding = {encoding};
        using (var voice = Mossnano.Start(command, SayError))
        {{
            voice.Feed(new byte[voice.FrameBytes]);
            voice.Finish();
            var pcm = new short[960];
            int heard = 0;
            Until(() => (heard += voice.Pull(pcm)) > 0 && !voice.IsSpeaking);
            Say("heard", heard, Console.InputEncoding.GetPreamble().Length > 0);
        }}
        """,
    )
    assert said == ["heard 3840 True"], "and the host's setting is as it was"


# A decoder of as many channels as it is told, which gives six values.
SIX_VALUES = r"""
import os, struct, sys
def say(kind, payload):
    os.write(1, struct.pack("<IB", len(payload) + 1, kind) + payload)
say(0, b'{"protocol": 1, "direction": "decode", "sample_rate": 1000, "channels": %d, "frame_samples": 3,'
       b'"quantizers": 4, "codebook_size": 1000, "frame_bytes": 5, "max_audio_bytes": 64}' % int(sys.argv[1]))
os.read(0, 10)
say(1, struct.pack("<6h", 32767, -32767, 3276, 0, -3276, 6553))
say(7, b'{"stream": 0, "frames": 1, "samples": 3, "cancelled": false, "errors": 0, "next_stream": 1}')
while os.read(0, 1000): pass
"""


@pytest.mark.parametrize(
    ("coded", "engine", "values"),
    [
        (2, 1, "0 0.05 0.05"),
        (2, 2, "1.00 -1.00 0.10 0 -0.10 0.20"),
        (2, 6, "1.00 -1.00 0 0 0 0 0.10 0 0 0 0 0 -0.10 0.20 0 0 0 0"),
        (1, 2, "1.00 1.00 -1.00 -1.00 0.10 0.10 0 0 -0.10 -0.10 0.20 0.20"),
        (1, 1, "1.00 -1.00 0.10 0 -0.10 0.20"),
        (3, 2, "1.00 -1.00 0 -0.10"),
    ],
)
def test_an_engine_of_any_channels_hears_it_all_and_in_front(
    library: Path, tmp_path: Path, coded: int, engine: int, values: str
) -> None:
    (tmp_path / "decoder.py").write_text(SIX_VALUES)
    said = play(
        library,
        f"""
        // Its END may come later than its sound: a pull in between is an underrun, which would fade out.
        var options = new MossnanoOptions {{ Command = command, OnError = SayError, FadeMs = 0 }};
        using (var voice = Mossnano.Start(options))
        {{
            voice.Feed(new byte[5]);
            voice.Finish();
            float[] data = null;
            Until(() =>
            {{
                data = Enumerable.Repeat(9f, {len(values.split()) + 1}).ToArray(); // one more than whole samples
                return voice.Pull(data, {engine}) > 0;
            }});
            Say(string.Join(" ", data.Select(value => value == 0 ? "0" : value.ToString("0.00"))));
        }}
        """,
        [sys.executable, tmp_path / "decoder.py", coded],
    )
    assert said == [f"{values} 0"]


def test_a_process_that_hangs_holds_nobody_up(library: Path, tmp_path: Path) -> None:
    """Nothing waits for it, 4 MiB are kept for it, more are refused, and when it goes on, all is as it should be."""
    frames = tokens_payload(some_frames(30, NANO))
    (tmp_path / "tokens").write_bytes(frames)
    command = [*DEMO, "--chunk-frames", "4"]
    said = play(
        library,
        f"""
        var options = new MossnanoOptions {{ Command = command, OnError = SayError, FadeMs = 0 }};
        using (var voice = Mossnano.Start(options))
        {{
            byte[] many = new byte[8000 * voice.FrameBytes], tokens = File.ReadAllBytes("{tmp_path / "tokens"}");
            Signal("STOP", voice);
            Say("fed", voice.Feed(many), voice.Finish(), voice.Cancel());
            int fed = 0;
            while (voice.Feed(many)) fed++;
            Say(fed, "were taken, and then", voice.Finish());
            for (int times = 0; times < 1000; times++) voice.Cancel();
            Say("fed", voice.Feed(tokens), voice.Finish(), voice.IsSpeaking);
            Signal("CONT", voice);
            File.WriteAllBytes("{tmp_path / "heard"}", Hear(voice));
        }}
        """,
        command,
    )
    first, refused, *rest = said
    assert first == "fed True True True"
    assert refused.startswith("error queue_full False ")
    assert "4194304 (4 MiB) are allowed" in refused
    taken, then = rest[0].split(maxsplit=1)
    assert 25 <= int(taken) <= 28, "of 160,015 bytes into 4 MiB; a pipe and a read may take 64 KiB each"
    assert [then, *rest[1:]] == ["were taken, and then True", "fed True True True"]
    wire = encode_message(Kind.TOKENS, frames) + encode_message(Kind.END)
    assert (tmp_path / "heard").read_bytes() == run([*command, "--output", "raw"], wire).stdout


def test_a_process_that_hangs_is_ended_by_dispose(library: Path) -> None:
    said = play(
        library,
        """
        var voice = Mossnano.Start(command, SayError);
        int pid = voice.Pid;
        Signal("STOP", voice);
        voice.Feed(new byte[8000 * voice.FrameBytes]);
        voice.Dispose();
        Say("there", Directory.Exists("/proc/" + pid));
        """,
    )
    assert said == ["there False"]


def pulled(line: str) -> list[int]:
    return [int(value) for value in line.removeprefix("pulled ").split(",")]


def largest_step(values: list[int]) -> int:
    return max(abs(after - before) for before, after in itertools.pairwise(values))


def test_an_underrun_fades_out_and_what_follows_fades_in(library: Path) -> None:
    *said, line = play(
        library,
        """
        using (var voice = Mossnano.Start(new MossnanoOptions { Command = command, OnError = SayError }))
        {
            FeedSteady(voice, 1000);
            Say(PullSteady(voice, 900), PullSteady(voice, 300), "underruns", voice.Underruns);
            Say(PullSteady(voice, 64), PullSteady(voice, 64), "underruns", voice.Underruns);
            FeedSteady(voice, 1000);
            for (int times = 0; times < 10; times++) PullSteady(voice, 100);
            FinishSteady(voice);
            Say(PullSteady(voice, 10), "speaking", voice.IsSpeaking);
            SayPulled();
        }
        """,
        STEADY,
    )
    assert said == ["900 100 underruns 1", "0 0 underruns 2", "0 speaking False"]
    sound = pulled(line)
    assert sound[:1000] == [LOUD] * 1000
    assert sound[999 + FADE : 1328] == [0] * (329 - FADE)
    rising = sound[1328 : 1328 + FADE]
    assert rising == sorted(rising)
    assert sound[1328 + FADE - 1 : 2328] == [LOUD] * (1001 - FADE), "no sample is lost"
    assert sound[2328:] == [0] * 10, "the stream ends as it is"
    assert largest_step(sound[:2328]) <= LOUD / FADE + 1


@pytest.mark.parametrize("waiting", [40, 5000], ids=["less than a fade", "more than a fade"])
@pytest.mark.parametrize("size", [64, 480], ids=["small pulls", "a large pull"])
def test_cancel_fades_out_what_is_heard_and_what_follows_fades_in(library: Path, waiting: int, size: int) -> None:
    *said, line = play(
        library,
        f"""
        using (var voice = Mossnano.Start(new MossnanoOptions {{ Command = command, OnError = SayError }}))
        {{
            FeedSteady(voice, 480 + {waiting});
            PullSteady(voice, 480);
            voice.Cancel();
            for (int at = 0; at < 480; at += {size}) Say(PullSteady(voice, {size}));
            Until(() => Inside<int>(voice, "cancelsAnswered") == 1);
            FeedSteady(voice, 1000);
            FinishSteady(voice);
            while (voice.IsSpeaking) Say(PullSteady(voice, 1000));
            SayPulled();
        }}
        """,
        STEADY,
    )
    pulls = -(-480 // size)
    assert said == [*["0"] * pulls, "1000"], "a fade counts for nothing"
    sound = pulled(line)
    silent_from, next_from = 479 + FADE, 480 + pulls * size
    assert sound[:480] == [LOUD] * 480
    assert sound[480:silent_from] == sorted(sound[480:silent_from], reverse=True)
    assert sound[silent_from:next_from] == [0] * (next_from - silent_from)
    assert sound[next_from + FADE - 1 :] == [LOUD] * (1001 - FADE)
    assert largest_step(sound) <= LOUD / FADE + 1


def test_a_fade_of_nothing_leaves_every_sample_as_it_came(library: Path) -> None:
    *_, line = play(
        library,
        """
        using (var voice = Mossnano.Start(new MossnanoOptions { Command = command, FadeMs = 0 }))
        {
            FeedSteady(voice, 100);
            PullSteady(voice, 150); // an underrun
            FeedSteady(voice, 200);
            PullSteady(voice, 100);
            voice.Cancel();
            PullSteady(voice, 100);
            SayPulled();
        }
        """,
        STEADY,
    )
    assert pulled(line) == [LOUD] * 100 + [0] * 50 + [LOUD] * 100 + [0] * 100


def test_a_stream_that_ends_by_itself_is_not_faded(library: Path) -> None:
    *said, line = play(
        library,
        """
        using (var voice = Mossnano.Start(command, SayError))
        {
            for (int stream = 0; stream < 2; stream++)
            {
                FeedSteady(voice, 100);
                FinishSteady(voice);
            }
            Say(PullSteady(voice, 250), PullSteady(voice, 10), "underruns", voice.Underruns);
            voice.Cancel();
            PullSteady(voice, 10);
            SayPulled();
        }
        """,
        STEADY,
    )
    assert said == ["200 0 underruns 0"]
    assert pulled(line) == [LOUD] * 200 + [0] * 70


def test_a_prebuffer_is_gathered_before_a_stream_and_after_an_underrun(library: Path) -> None:
    said = play(
        library,
        """
        var options = new MossnanoOptions { Command = command, OnError = SayError, PrebufferMs = 10, FadeMs = 0 };
        using (var voice = Mossnano.Start(options))
        {
            FeedSteady(voice, 479);
            Say("gathering", PullSteady(voice, 100), "underruns", voice.Underruns);
            FeedSteady(voice, 1);
            Say("gathered", PullSteady(voice, 100), PullSteady(voice, 400), "underruns", voice.Underruns);
            FeedSteady(voice, 479);
            Say("gathering", PullSteady(voice, 100), "underruns", voice.Underruns);
            FinishSteady(voice);
            FeedSteady(voice, 100);
            Say("all there is, and not the next", PullSteady(voice, 500), PullSteady(voice, 1));
            FeedSteady(voice, 380);
            Say("the next", PullSteady(voice, 500), "underruns", voice.Underruns);
            voice.Cancel();
            Until(() => Inside<int>(voice, "cancelsAnswered") == 1);
            FeedSteady(voice, 100);
            Say("gathering", PullSteady(voice, 10));
            FinishSteady(voice);
            Say("short", PullSteady(voice, 100), voice.IsSpeaking);
        }
        options.PrebufferMs = 10001;
        try { Mossnano.Start(options); }
        catch (ArgumentException error) { Say(error.Message); }
        """,
        STEADY,
    )
    assert said[:-1] == [
        "gathering 0 underruns 0",
        "gathered 100 380 underruns 1",
        "gathering 0 underruns 1",
        "all there is, and not the next 479 0",
        "the next 480 underruns 2",
        "gathering 0",
        "short 100 False",
    ]
    assert "PrebufferMs 10001" in said[-1]


def test_jitter_that_a_prebuffer_covers_costs_no_underrun(library: Path) -> None:
    """Fed as it is heard, 80 ms at a time, with up to 80 ms of jitter: the clock is that of the pulls."""
    script = """
        var options = new MossnanoOptions {{ Command = command, OnError = SayError, PrebufferMs = {prebuffer} }};
        var random = new Random(1);
        using (var voice = Mossnano.Start(options))
        {{
            int frames = 0;
            double due = 0;
            for (int ms = 0; ms < 4000; ms += 10)
            {{
                for (; ms >= due; due = 80 * frames + 10 + 70 * random.NextDouble())
                {{
                    FeedSteady(voice, 3840);
                    frames++;
                }}
                PullSteady(voice, 480);
            }}
            Say(voice.Underruns > 0);
        }}
    """
    assert play(library, script.format(prebuffer=0), STEADY) == ["True"]
    assert play(library, script.format(prebuffer=160), STEADY) == ["False"]


def test_a_launch_returns_at_once_and_its_state_says_how_it_goes(library: Path, tmp_path: Path) -> None:
    said = play(
        library,
        """
        var lines = new List<string>();
        var voice = Mossnano.Launch(new MossnanoOptions
        {
            Command = command, OnError = SayError, OnLost = SayLost, Log = line => { lock (lines) lines.Add(line); },
        });
        Say(voice.State, voice.Reason == null, voice.Format == null, voice.Stream, voice.Played.Stream);
        Say(voice.Feed(new byte[4]), voice.FeedCodes(new int[4]), voice.Finish(), voice.Cancel());
        Say(voice.Pull(new short[4]), voice.Pull(new float[4], 2), voice.IsSpeaking);
        File.WriteAllText(command.Last(), ""); // now it may go on
        Until(() => voice.State != MossnanoState.Starting);
        Say(voice.State, voice.Version, voice.Demo, voice.Format["name"], voice.Pid > 0);
        voice.Feed(new byte[4]);
        Until(() => voice.State == MossnanoState.Failed && Inside<Thread>(voice, "reader").Join(0));
        Say(voice.State, voice.Reason, voice.Pid, voice.Stream);
        lock (lines) foreach (string line in lines) Say("line", line);
        voice.Dispose();
        Say(voice.State);
        """,
        [
            "sh",
            "-c",
            f'until [ -e "$0" ]; do sleep 0.05; done; exec "{STEADY[0]}" "{STEADY[1]}"',
            library.parent / "go",
        ],
    )
    reason = "the process ended by itself with status 3: its stderr says more"
    assert said == [
        "Starting True True -1 -1",
        "False False False False",
        "0 0 False",
        "Ready 1.2 True steady True",
        "lost 0",
        f"error process_ended True {reason}",
        f"Failed {reason} (process_ended) 0 0",
        "line loading",
        "line dying: grün",
        "line without a last line",
        "Stopped",
    ]


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        (["no-such-decoder"], "not_started", "no-such-decoder cannot be started"),
        ([*DEMO[:-1], "nowhere"], "bad_weights", "nowhere"),
        (["true"], "process_ended", "status 0: its stderr says more (process_ended)"),
        (["sleep", "600"], "timeout", "no HANDSHAKE in time: allow more startSeconds"),
    ],
    ids=["no program", "no weights", "no decoder", "no answer"],
)
def test_a_launch_that_fails_tells_why_and_is_not_tried_again(
    library: Path, command: list[str], code: str, reason: str
) -> None:
    error, failed = play(
        library,
        f"""
        using (var voice = Mossnano.Launch(new MossnanoOptions
        {{
            Command = command, OnError = SayError, Restart = 5, Log = line => {{ }},
            StartSeconds = {0.5 if code == "timeout" else 60},
        }}))
        {{
            Until(() => voice.State == MossnanoState.Failed && Inside<Thread>(voice, "reader").Join(0));
            Say(voice.Restarts, voice.Reason);
        }}
        """,
        command,
    )
    assert error.startswith(f"error {code} True ")
    assert failed.startswith("0 ")
    assert reason in failed


def test_dispose_ends_a_launch(library: Path) -> None:
    said = play(
        library,
        """
        var voice = Mossnano.Launch(new MossnanoOptions { Command = command, OnError = SayError });
        Until(() => voice.Pid != 0);
        int pid = voice.Pid;
        voice.Dispose();
        Say(voice.State, Directory.Exists("/proc/" + pid));
        Mossnano.Launch(new MossnanoOptions { Command = command, OnError = SayError }).Dispose();
        """,
        ["sleep", "600"],
    )
    assert said == ["Stopped False"]


def test_an_end_that_a_fatal_error_brings_is_no_end(library: Path) -> None:
    """It says how much was sent, which is less than all. So it ends no row of restarts either."""
    said = play(
        library,
        """
        var voice = Mossnano.Start(new MossnanoOptions {
            Command = command, Restart = 1, OnLost = SayLost, OnError = SayError, Log = line => { } });
        for (int restarts = 1; restarts <= 2; restarts++)
        {
            voice.Feed(new byte[20]);
            voice.Feed(new byte[400]);
            Until(() => voice.State == MossnanoState.Failed
                || (voice.Restarts == restarts && voice.State == MossnanoState.Ready));
        }
        Say("restarts", voice.Restarts);
        voice.Dispose();
        """,
        [*DEMO, "--max-message-bytes", "300"],
    )
    assert [" ".join(line.split()[:3]) for line in said] == [
        "error framing_lost False",
        "lost 0",
        "error process_ended False",
        "error framing_lost True",
        "lost 1",
        "restarts 1",
    ]


def test_a_crash_is_survived_and_what_was_fed_is_reported_lost(library: Path) -> None:
    *said, line, lost, last_error, failed = play(
        library,
        """
        Mossnano voice = null;
        voice = Mossnano.Start(new MossnanoOptions
        {
            Command = command, Restart = 1, OnLost = SayLost, Log = line => { },
            OnError = (code, message, fatal) =>
            {
                SayError(code, message, fatal);
                Say("while told", voice.State, voice.Feed(new byte[4]));
            },
        });
        int before = voice.Pid;
        FeedSteady(voice, 100); // stream 0 is heard to its end
        FinishSteady(voice);
        PullSteady(voice, 100);
        FeedSteady(voice, 500); // stream 1 is cut
        Signal("STOP", voice);
        voice.Feed(new byte[4]);
        voice.Finish();
        voice.Feed(BitConverter.GetBytes(7)); // stream 2 is not even begun
        Signal("CONT", voice);
        Until(() => voice.Restarts == 1 && voice.State == MossnanoState.Ready);
        Say("again", voice.Pid != before, voice.IsSpeaking);
        FeedSteady(voice, 300); // stream 3 lies behind what is left of stream 1
        FinishSteady(voice);
        Say(PullSteady(voice, 500), voice.Played.Stream, voice.Played.Samples);
        Say(PullSteady(voice, 240), voice.Played.Stream, voice.Played.Samples);
        Say(PullSteady(voice, 300), voice.Played.Stream, voice.Played.Samples, voice.IsSpeaking, voice.Underruns);
        voice.Feed(new byte[4]); // a stream came to its end: it may be started again
        Until(() => voice.Restarts == 2 && voice.State == MossnanoState.Ready);
        SayPulled();
        voice.Feed(new byte[4]); // none did
        Until(() => voice.State == MossnanoState.Failed && Inside<Thread>(voice, "reader").Join(0));
        voice.Dispose();
        """,
        STEADY,
    )
    crash = "the process ended by itself with status 3: its stderr says more"
    assert said == [
        "lost 1,2",
        f"error process_ended False {crash}; it is started again, without what was fed to the streams 1, 2",
        "while told Starting False",
        "again True True",
        "500 1 500",
        "0 1 500",
        "300 3 300 False 0",
        "lost 4",
        f"error process_ended False {crash}; it is started again, without what was fed to the streams 4",
        "while told Starting False",
    ]
    assert lost == "lost 5"
    assert last_error == f"error process_ended True {crash}"
    assert failed == "while told Failed False"
    sound = pulled(line)
    assert sound[:600] == [LOUD] * 600
    assert sound[599 + FADE] == 0
    assert sound[600 + FADE + FADE :] == [LOUD] * (300 - FADE)
    assert largest_step(sound) <= LOUD / FADE + 1


def test_other_weights_after_a_crash_are_refused(library: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(STEADY[1].read_text().replace('"sample_rate": 48000', '"sample_rate": 24000'))
    said = play(
        library,
        """
        var voice = Mossnano.Start(new MossnanoOptions { Command = command, OnError = SayError, Restart = 1 });
        voice.Feed(new byte[4]);
        Until(() => voice.State == MossnanoState.Failed && Inside<Thread>(voice, "reader").Join(0));
        Say(voice.Reason);
        voice.Dispose();
        """,
        ["sh", "-c", 'mkdir "$0" && exec "$1" "$2" || exec "$1" "$3"', tmp_path / "was", STEADY[0], STEADY[1], other],
    )
    change = "sample_rate was 48000 and is now 24000: start a new voice for other weights"
    assert said[1:] == [f"error handshake True {change}", f"{change} (handshake)"]


def test_played_says_how_much_of_which_stream_was_given_out(library: Path) -> None:
    said = play(
        library,
        """
        using (var voice = Mossnano.Start(command, SayError))
        {
            Action say = () => Say(voice.Stream, voice.Played.Stream, voice.Played.Samples);
            say();
            FeedSteady(voice, 100);
            FinishSteady(voice);
            PullSteady(voice, 50);
            say();
            FeedSteady(voice, 1000);
            PullSteady(voice, 350);
            say();
            voice.Cancel();
            PullSteady(voice, 480);
            say();
            Until(() => Inside<int>(voice, "cancelsAnswered") == 1);
            FeedSteady(voice, 10);
            say();
            PullSteady(voice, 1);
            say();
        }
        """,
        STEADY,
    )
    assert said == ["-1 -1 0", "0 0 50", "1 1 300", "1 1 300", "2 1 300", "2 2 1"]


def test_a_mono_voice_is_in_the_middle_of_an_engine(library: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(tokens_payload(some_frames(1, NANO)))
    said = play(
        library,
        f"""
        using (var client = Mossnano.Start(command, SayError))
        {{
            var usual = client.Open();
            var mono = client.Open(new MossnanoVoiceOptions {{ Mono = true, Gain = 0.25 }});
            foreach (MossnanoVoice voice in new[] {{ usual, mono }})
            {{
                voice.Feed(File.ReadAllBytes("{tmp_path / "tokens"}"));
                voice.Finish();
            }}
            var pcm = new short[2 * 480];
            var engine = new float[4 * 480];
            Until(() => usual.Pull(pcm) == 480);
            Until(() => mono.Pull(engine, 4) == 480);
            float off = 0, loudest = 0;
            for (int i = 0; i < 480; i++)
            {{
                float mean = (pcm[2 * i] + pcm[2 * i + 1]) / 2f / 32767 / 4;
                off = Math.Max(off, Math.Abs(engine[4 * i] - mean) + Math.Abs(engine[4 * i + 1] - mean));
                off = Math.Max(off, Math.Abs(engine[4 * i + 2]) + Math.Abs(engine[4 * i + 3]));
                loudest = Math.Max(loudest, Math.Abs(mean));
            }}
            Say(off < 1e-6, loudest > 0.001);
        }}
        """,
    )
    assert said == ["True True"]
