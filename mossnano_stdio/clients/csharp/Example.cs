// Example.cs: a file of packed frames in, PCM on stdout, as an audio callback would get it.
//
//     mcs Example.cs Mossnano.cs && mono Example.exe tokens.bin mossnano-stdio --weights demo > out.pcm
using System;
using System.IO;
using System.Linq;
using System.Threading;

static class Example
{
    static void Main(string[] words)
    {
        var options = new MossnanoOptions
        {
            Command = words.Skip(1).ToArray(), FadeMs = 0, // gaps are left out below, not heard
            OnError = (code, text, fatal) => Console.Error.WriteLine(code + ": " + text),
        };
        using (var voice = Mossnano.Start(options))
        using (var stdout = Console.OpenStandardOutput())
        {
            voice.Feed(File.ReadAllBytes(words[0]));
            voice.Finish();
            var pcm = new short[480 * voice.Channels]; // what a sound card asks for: 10 ms of 48 kHz
            var bytes = new byte[2 * pcm.Length];
            while (voice.IsSpeaking)
            {
                int samples = voice.Pull(pcm);
                Buffer.BlockCopy(pcm, 0, bytes, 0, bytes.Length);
                stdout.Write(bytes, 0, 2 * samples * voice.Channels);
                if (samples < 480) Thread.Sleep(1); // a sound card would play the silence that is in pcm now
            }
        }
    }
}
