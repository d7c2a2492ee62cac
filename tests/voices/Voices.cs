// Does what stdin says with voices of one client, and answers each line with one. Voices COMMAND...
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Reflection;
using System.Text;
using System.Threading;

static class Voices
{
    static readonly MossnanoVoice[] voices = new MossnanoVoice[64];
    static Mossnano client;
    static int errors;
    static string lastError = "";

    static void NoteError(string code, string message, bool fatal)
    {
        lastError = code;
        Interlocked.Increment(ref errors);
    }

    static double Number(string word) { return double.Parse(word, CultureInfo.InvariantCulture); }

    static string Open(int number, string[] words)
    {
        try
        {
            voices[number] = client.Open(new MossnanoVoiceOptions
            {
                RingSeconds = Number(words[0]), PrebufferMs = Number(words[1]), FadeMs = Number(words[2]),
                Gain = Number(words[3]), Mono = words[4] == "1", Priority = int.Parse(words[5]),
            });
            return "opened";
        }
        catch (InvalidOperationException error) { return error.Message; }
        catch (ArgumentException error) { return error.Message; }
    }

    static bool FeedCodes(MossnanoVoice voice, byte[] data)
    {
        var codes = new int[data.Length / 2];
        for (int i = 0; i < codes.Length; i++) codes[i] = BitConverter.ToUInt16(data, 2 * i);
        return voice.FeedCodes(codes);
    }

    static bool Mark(MossnanoVoice voice, string text)
    {
        try { return voice.Mark(text); }
        catch (ArgumentException) { return false; }
    }

    static string Marks(MossnanoVoice voice)
    {
        var said = new StringBuilder();
        MossnanoMark mark;
        while (voice.TakeMark(out mark)) said.Append(mark.Text + "@" + mark.Sample + " ");
        return said.ToString();
    }

    static string Pull(MossnanoVoice voice, int samples, int channels)
    {
        short[] pcm = Enumerable.Repeat((short)0x5555, samples * channels).ToArray();
        int real = voice.Pull(pcm);
        return real + " " + string.Join(" ", pcm);
    }

    // FOLDER NUMBER...: all that is real of several, in turn, until all are silent, into FOLDER/NUMBER.pcm.
    static string Hear(string[] words)
    {
        int[] numbers = words.Skip(1).Select(int.Parse).ToArray();
        Dictionary<int, MemoryStream> heard = numbers.ToDictionary(number => number, number => new MemoryStream());
        var pcm = new short[2 * 480];
        var bytes = new byte[4 * 480];
        for (bool isAny = true; isAny; Thread.Sleep(1))
        {
            isAny = false;
            foreach (int number in numbers)
            {
                isAny |= voices[number].IsSpeaking;
                int samples = voices[number].Pull(pcm);
                Buffer.BlockCopy(pcm, 0, bytes, 0, bytes.Length);
                heard[number].Write(bytes, 0, 4 * samples);
            }
        }
        foreach (int number in numbers) File.WriteAllBytes(words[0] + "/" + number + ".pcm", heard[number].ToArray());
        return "heard";
    }

    static long Waiting(MossnanoVoice voice)
    {
        Func<string, long> inside = name =>
            (long)typeof(MossnanoVoice).GetField(name, BindingFlags.Instance | BindingFlags.NonPublic).GetValue(voice);
        return (inside("written") - inside("taken")) / client.Channels;
    }

    static object Answer(string verb, int number, string rest, string[] words)
    {
        MossnanoVoice voice = voices[number];
        switch (verb)
        {
            case "open": return Open(number, words.Skip(2).ToArray());
            case "feed": return voice.Feed(File.ReadAllBytes(rest));
            case "codes": return FeedCodes(voice, File.ReadAllBytes(rest));
            case "mark": return Mark(voice, rest);
            case "marks": return Marks(voice);
            case "finish": return voice.Finish();
            case "cancel": return voice.Cancel();
            case "pull": return Pull(voice, int.Parse(rest), 2);
            case "pull_mono": return Pull(voice, int.Parse(rest), 1);
            case "gain": voice.Gain = Number(rest); return "set";
            case "played": return voice.Played;
            case "underruns": return voice.Underruns;
            case "speaking": return voice.IsSpeaking;
            case "reason": return voice.Reason;
            case "errors": return errors + " " + lastError;
            case "ready": return client.State == MossnanoState.Ready;
            case "waiting": return Waiting(voice);
            case "hear": return Hear(words.Skip(1).ToArray());
            case "close":
                if (voice != null) voice.Dispose();
                return "closed";
            default: throw new ArgumentException(verb);
        }
    }

    static void Main(string[] command)
    {
        var options = new MossnanoOptions { Command = command, OnError = NoteError, Restart = 1 };
        var stdin = new StreamReader(Console.OpenStandardInput(), new UTF8Encoding(false));
        var stdout = new StreamWriter(Console.OpenStandardOutput(), new UTF8Encoding(false)) { AutoFlush = true };
        using (client = Mossnano.Start(options))
        {
            stdout.WriteLine(client.MaxStreams + " " + client.Pid);
            for (string line; (line = stdin.ReadLine()) != null;)
            {
                string[] words = line.Split(' ');
                int number = 0;
                if (words.Length > 1) int.TryParse(words[1], out number);
                object answer = Answer(words[0], number, string.Join(" ", words.Skip(2)), words);
                stdout.WriteLine(answer is bool ? (bool)answer ? "1" : "0" : answer);
            }
        }
        stdout.WriteLine("stopped");
    }
}
