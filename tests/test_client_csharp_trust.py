"""What the C# client can do beyond what test_clients.py has every client do.

Each test is the body of a Main, compiled against the client and given a decoder's command as `command`; it says lines.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mossnano_stdio.protocol import Kind, encode_message
from tests.child import DEMO, ROOT, run
from tests.doubles import NANO, some_frames, tokens_payload

CLIENT = ROOT / "mossnano_stdio" / "clients" / "csharp" / "Mossnano.cs"

PROGRAM = """
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
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

    static void Signal(string name, Mossnano voice)
    {
        using (Process kill = Process.Start("kill", "-" + name + " " + voice.Pid)) kill.WaitForExit();
    }

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
        using (var voice = Mossnano.Start(command, SayError))
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
        using (var voice = Mossnano.Start(command, SayError))
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
    taken, *rest = rest
    assert taken in ("25 were taken, and then True", "26 were taken, and then True"), "of 160,015 bytes into 4 MiB"
    assert rest == ["fed True True True"]
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
