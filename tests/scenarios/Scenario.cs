// What test_clients.py has every client do; the same in each language. scenario MODE FOLDER RING_SECONDS COMMAND...
using System;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Threading;

static class Scenario
{
    static int fatalErrors;
    static string folder;

    static void SayError(string code, string text, bool fatal)
    {
        Console.WriteLine("error " + code + " " + (fatal ? 1 : 0) + " " + text);
        if (fatal) Interlocked.Increment(ref fatalErrors);
    }

    static byte[] Load(string name) { return File.ReadAllBytes(Path.Combine(folder, name)); }

    static int PullInto(Mossnano voice, Stream file, int wanted)
    {
        var pcm = Enumerable.Repeat((short)0x5555, wanted * 2).ToArray();
        int samples = voice.Pull(pcm);
        var bytes = new byte[4 * samples];
        Buffer.BlockCopy(pcm, 0, bytes, 0, bytes.Length);
        file.Write(bytes, 0, bytes.Length);
        if (pcm.Skip(2 * samples).Any(value => value != 0)) Console.WriteLine("no silence");
        if (samples < wanted) Thread.Sleep(1);
        return samples;
    }

    static void Play(Mossnano voice, string name)
    {
        using (var file = File.Create(Path.Combine(folder, name)))
            while (voice.IsSpeaking) PullInto(voice, file, 441);
    }

    static void Streams(Mossnano voice)
    {
        voice.Feed(Load("first.tokens"));
        voice.Finish();
        Play(voice, "first.pcm");

        voice.Feed(Load("second.tokens"));
        voice.Finish();
        using (var file = File.Create(Path.Combine(folder, "second.pcm")))
            for (int heard = 0; heard < 20000;) heard += PullInto(voice, file, 441);
        voice.Cancel();

        byte[] bytes = Load("third.codes");
        var codes = Enumerable.Range(0, bytes.Length / 2).Select(i => bytes[2 * i] | bytes[2 * i + 1] << 8).ToArray();
        voice.FeedCodes(codes);
        voice.Finish();
        Play(voice, "third.pcm");
        codes[3] = voice.CodebookSize;
        try { voice.FeedCodes(codes); Console.WriteLine("bad codes taken"); }
        catch (ArgumentException) { Console.WriteLine("bad codes refused"); }
    }

    static void Dry(Mossnano voice)
    {
        using (var file = File.Create(Path.Combine(folder, "dry.pcm")))
        {
            PullInto(voice, file, 441); // nothing was fed: silence, and no underrun
            Console.WriteLine("underruns " + voice.Underruns);
            voice.Feed(Load("first.tokens").Take(4 * voice.FrameBytes).ToArray());
            for (int heard = 0; heard < 4 * voice.FrameSamples;) heard += PullInto(voice, file, 480);
            long before = voice.Underruns;
            Console.WriteLine("silent " + (PullInto(voice, file, 480) == 0 ? 1 : 0));
            Console.WriteLine("counted " + (voice.Underruns - before));
            voice.Finish();
            while (voice.IsSpeaking) PullInto(voice, file, 480);
            before = voice.Underruns;
            PullInto(voice, file, 480);
            Console.WriteLine("counted " + (voice.Underruns - before));
        }
    }

    static void Dies(Mossnano voice)
    {
        var frame = new byte[voice.FrameBytes];
        voice.Feed(frame);
        Play(voice, "dies.pcm");
        while (Volatile.Read(ref fatalErrors) == 0) Thread.Sleep(1);
        Console.WriteLine("fed " + (voice.Feed(frame) ? 1 : 0));
        Console.WriteLine("finished " + (voice.Finish() ? 1 : 0));
    }

    static void Main(string[] words)
    {
        folder = words[1];
        try
        {
            double seconds = double.Parse(words[2], CultureInfo.InvariantCulture);
            var options = new MossnanoOptions
            {
                Command = words.Skip(3).ToArray(), OnError = SayError, RingSeconds = seconds, FadeMs = 0,
            };
            using (var voice = Mossnano.Start(options))
            {
                Console.WriteLine(string.Join(" ", "format", voice.SampleRate, voice.Channels, voice.FrameSamples,
                    voice.Quantizers, voice.CodebookSize, voice.FrameBytes, voice.MaxAudioBytes));
                if (words[0] == "streams") Streams(voice);
                if (words[0] == "dry") Dry(voice);
                if (words[0] == "dies") Dies(voice);
            }
            Console.WriteLine("stopped");
        }
        catch (InvalidOperationException error) { Console.WriteLine("not started " + error.Message); }
    }
}
