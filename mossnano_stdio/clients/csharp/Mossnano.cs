// Mossnano.cs: a voice for Unity and .NET. Starts `mossnano-stdio`, feeds it codec tokens, hands out PCM.
//
// One file, C# 7, no dependency: .NET Framework 4.8, .NET Standard 2.1, .NET 6 and later.
//
//     var voice = Mossnano.Start(new[] { "mossnano-stdio" }, (code, text, fatal) => ...);   // waits for the weights
//     voice.Feed(packedFrames);            // FrameBytes each; or FeedCodes(codes), Quantizers each
//     voice.Finish();                      // the stream is complete
//     voice.Cancel();                      // be silent, now: 5 ms fade out, the next stream may be fed at once
//     voice.Dispose();                     // ends the process; nothing of it is left
//
// Where nobody wants to wait for the weights, Launch gives a voice at once: ask its State, and for Failed its Reason.
// With Restart = N a process that crashes is started again, up to N times in a row (a stream that comes to its end ends
// the row): what was fed until then is lost, and onError and OnLost are told. Played says how much was heard of which
// stream, for barge-in; Stream is the one that Feed opened last. Log gets the lines of the process' stderr.
//
// In Unity: Launch, and
//
//     void OnAudioFilterRead(float[] data, int channels) { voice.Pull(data, channels); }
//
// with Unity's output at SampleRate (Project Settings, Audio). Two threads of yours may use a voice at the same time:
// one that controls, and one that pulls. Pull never locks, waits or allocates. Feed, Finish and Cancel never wait for
// the process, not even for one that hangs: a thread of ours writes, and up to 4 MiB (hours) may wait for it. A Feed
// beyond that is refused whole: it answers false, and onError is told `queue_full`. Another thread of ours reads all
// that the process says, and calls onError: touch no Unity object there. When the ring is full it waits for room, and
// so does the process.
//
// What is cut off, by Cancel or by an underrun, fades out over FadeMs, and what follows fades in; 0 leaves every sample
// as it came. With PrebufferMs a stream sounds once so much of it waits, or all of it, and so again after an underrun:
// fed in real time, with jitter, 100 to 200 are enough.
//
// Many voices of one process, at once: Open gives a MossnanoVoice for each utterance, with a ring and controls of its
// own. The process decodes ahead only what a voice's ring has room for, so one that nobody pulls stops none of the
// others, but for the stream of the client itself, which has no such limit: pull it, or feed voices alone.
//
//     var line = client.Open();            // or with MossnanoVoiceOptions
//     line.Feed(packedFrames); line.Mark("wave"); line.Feed(more); line.Finish();
//     while (line.TakeMark(out mark)) ...  // in Update: what was played by now, not what was decoded
//     long samples = line.Cancel();        // that were heard
//     line.Dispose();
//
// Tested on Linux with Mono. Unity, Windows, macOS and .NET 6 and later: NOT RUN in our checks. Unity's IL2CPP has
// no System.Diagnostics.Process on some platforms. Protocol version 1, see protocol.md.
using System;
using System.Collections.Generic;
using System.ComponentModel;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Reflection;
using System.Text;
using System.Threading;

public sealed class MossnanoOptions
{
    public string[] Command = { "mossnano-stdio" }; // the program, looked up on the PATH, and its arguments
    public Mossnano.ErrorHandler OnError; // on a thread of ours, as all that follow
    public Action<long[]> OnLost;    // the streams, by number, that were fed to a process that crashed and will not end
    public Action<string> Log;       // the lines of the process' stderr, which otherwise go to ours
    public double RingSeconds = 10;  // PCM that may wait to be pulled
    public double StartSeconds = 60; // how long loading the weights may take
    public double FadeMs = 5;        // out where a CANCEL or an underrun cuts a stream, in where it goes on; 0: a click
    public double PrebufferMs;       // of a stream are gathered before it is heard, and again after an underrun
    public int Restart;              // how many times in a row a process that crashed is started again
}

// Starting: also while a process that crashed is started again.
public enum MossnanoState { Starting, Ready, Failed, Stopped }

public struct MossnanoPlayed
{
    public readonly long Stream;  // the one that was pulled last, from 0; -1 before the first
    public readonly long Samples; // of it that were given out; what fades out counts for nothing

    public MossnanoPlayed(long stream, long samples)
    {
        Stream = stream;
        Samples = samples;
    }
}

public sealed class MossnanoVoiceOptions
{
    public double RingSeconds = 2; // PCM that the process may send ahead; at least PrebufferMs and one chunk
    public double FadeMs = 5, PrebufferMs; // as in MossnanoOptions
    public double Gain = 1;        // a factor, 0 to 100
    public bool Mono;              // Pull gives the mean of all channels: one value, or in both of the engine's front pair
    public int Priority;           // who goes first where there is too much to do: from 3 to -4, the last
}

public struct MossnanoMark
{
    public readonly long Sample; // of its stream; it was pulled
    public readonly byte[] Bytes;

    public string Text { get { return Encoding.UTF8.GetString(Bytes); } }

    public MossnanoMark(long sample, byte[] bytes)
    {
        Sample = sample;
        Bytes = bytes;
    }
}

public sealed class Mossnano : IDisposable
{
    public delegate void ErrorHandler(string code, string message, bool fatal);

    internal const int Handshake = 0, Audio = 1, Tokens = 4, Error = 5, End = 7, CancelKind = 8, Settings = 9;
    internal const int Credit = 10, MarkKind = 11;
    internal const int Numbered = 0x80; // added to a kind: the payload begins with the number of its stream
    internal const int NumberBytes = 4;
    const int LongestMessage = 1 << 20; // of the process
    internal const int PieceBytes = 1 << 16; // of what is fed in one message: CANCEL must not wait behind a long one
    internal const int HeadBytes = 5;    // of a message: its length and its kind
    internal const int QueueBytes = 4 << 20; // of messages that the process has not taken yet
    const int CreditMs = 10;            // how often one looks how far a voice was pulled
    const int FirstPauseMs = 250;       // before a restart; twice as long before the next one in a row,
    const int LongestPauseMs = 8000;    // up to this
    const int StopMs = 2000;            // how long the process may take to end by itself

    // As the process says in its HANDSHAKE.
    public int SampleRate { get; private set; }
    public int Channels { get; private set; }
    public int FrameSamples { get; private set; }
    public int Quantizers { get; private set; }
    public int CodebookSize { get; private set; }
    public int FrameBytes { get; private set; }
    public int MaxAudioBytes { get; private set; }

    public string Version { get; private set; } // of the program
    public bool Demo { get; private set; }      // the built-in demo, no real codec
    public IReadOnlyDictionary<string, string> Format { get; private set; } // all that it said, as texts

    public MossnanoState State { get { return state; } }
    public string Reason { get; private set; } // why the State is Failed
    public int Pid { get { return pid; } }     // 0: there is no process now
    public int Restarts { get { return restarts; } }

    Process process;
    Stream output;
    Thread writer;
    readonly Thread reader;
    internal readonly MossnanoOptions options;
    readonly ErrorHandler onError;
    readonly TimeSpan patience;            // with a start
    readonly bool startThrows;             // what goes wrong until the process is ready
    readonly ManualResetEvent started = new ManualResetEvent(false), stopping = new ManualResetEvent(false);
    volatile MossnanoState state;
    volatile int pid, restarts;
    int launches, restartsInARow;
    internal readonly object gate = new object(); // of controlling threads and ours; the puller never takes it
    readonly LinkedList<Message> queue = new LinkedList<Message>(); // that the writer has not begun yet
    internal int queuedBytes;              // theirs, and those of the message that is being written
    readonly MossnanoVoice plain;          // of the streams that have no number of their own
    internal readonly List<MossnanoVoice> voices = new List<MossnanoVoice>(); // that have one
    uint numbersUsed;
    string fault;                          // what was said last, for Reason
    bool fatalWasSaid, isClosing, isLate;
    long cancelled;                        // streams that were open at the last CANCEL
    volatile bool hasRing;
    internal volatile bool isStopping;

    sealed class Message
    {
        public byte[] Bytes;
        public MossnanoVoice Owner; // that it is dropped with; or null
    }

    /// <summary>Returns when the process is ready; an InvalidOperationException says why it will not be.</summary>
    public static Mossnano Start(string[] command, ErrorHandler onError = null, double ringSeconds = 10, double startSeconds = 60)
    {
        return Start(new MossnanoOptions
        {
            Command = command, OnError = onError, RingSeconds = ringSeconds, StartSeconds = startSeconds,
        });
    }

    /// <summary>The same, with every option there is.</summary>
    public static Mossnano Start(MossnanoOptions options)
    {
        var voice = new Mossnano(options, true);
        bool isInTime = voice.started.WaitOne(voice.patience + TimeSpan.FromMilliseconds(StopMs));
        if (voice.State == MossnanoState.Ready) return voice;
        voice.Dispose();
        throw new InvalidOperationException(isInTime ? voice.Reason : TooLate);
    }

    /// <summary>The same at once: a voice whose State is Starting. OnError is told what goes wrong meanwhile, too.
    /// Until it is Ready, Feed, Finish and Cancel answer false, and Pull gives silence.</summary>
    public static Mossnano Launch(MossnanoOptions options)
    {
        return new Mossnano(options, false);
    }

    Mossnano(MossnanoOptions options, bool startThrows)
    {
        if (options.FadeMs < 0 || options.PrebufferMs < 0 || options.PrebufferMs > 1000 * options.RingSeconds)
            throw new ArgumentException("FadeMs " + options.FadeMs + ", PrebufferMs " + options.PrebufferMs
                + ": neither may be negative, and what is gathered must fit into RingSeconds, " + options.RingSeconds);
        patience = TimeSpan.FromSeconds(Math.Min(options.StartSeconds, 1e6)); // timers take no more than some weeks
        this.options = options;
        this.startThrows = startThrows;
        onError = options.OnError;
        plain = new MossnanoVoice(this);
        reader = new Thread(Run) { IsBackground = true, Name = "Mossnano" };
        reader.Start();
    }

    /// <summary>Adds packed frames, FrameBytes each, to the stream, and opens one where none is open.
    /// False unless the State is Ready, or when more than 4 MiB would wait for the process (`queue_full`, and nothing
    /// of this was taken); the error handler was told why.</summary>
    public bool Feed(byte[] packed) { return plain.Feed(packed); }

    /// <summary>The same for codes, Quantizers for each frame.</summary>
    public bool FeedCodes(int[] codes) { return plain.FeedCodes(codes); }

    /// <summary>The stream is complete.</summary>
    public bool Finish() { return plain.Finish(); }

    /// <summary>Be silent, now: drops whatever was fed, and all that waits to be pulled.</summary>
    public bool Cancel()
    {
        lock (gate)
        {
            DropQueued(plain); // what has not left never will
            plain.isOpen = false;
            cancelled = plain.opened;
            // The puller is silent and the reader drops, until the END of this CANCEL, or of a later one, is back.
            int number = Interlocked.Increment(ref plain.cancels);
            byte[] echo = Encoding.ASCII.GetBytes(FormattableString.Invariant($"{plain.opened} {number}"));
            bool isAnswered = state == MossnanoState.Ready;
            if (isAnswered) Enqueue(plain, CancelKind, echo, 0, echo.Length, true);
            else plain.AnswerCancel(plain.opened, number);
            return isAnswered;
        }
    }

    /// <summary>The number of the stream that Feed opened last, from 0; -1 before the first.</summary>
    public long Stream { get { return Interlocked.Read(ref plain.opened) - 1; } }

    /// <summary>How much was heard of which stream, as far as we know: less what the sound card still holds.</summary>
    public MossnanoPlayed Played
    {
        get
        {
            long both = Volatile.Read(ref plain.played); // one number, so that they belong together
            return new MossnanoPlayed(both >> MossnanoVoice.SampleBits, both & (1L << MossnanoVoice.SampleBits) - 1);
        }
    }

    /// <summary>Fills pcm, Channels interleaved: with samples, a fade-out where they break off, and silence.
    /// Returns how many samples of all channels are real.</summary>
    public int Pull(short[] pcm) { return plain.Pull(pcm); }

    /// <summary>The same as floats, for as many channels as the engine has: one gets the mean of all of ours, two and
    /// more get ours in the front pair, and silence in the rest.</summary>
    public int Pull(float[] data, int channels) { return plain.Pull(data, channels); }

    /// <summary>Is something to be pulled, now or later?</summary>
    public bool IsSpeaking { get { return plain.IsSpeaking; } }

    /// <summary>Pulls that found the ring dry in the middle of a stream.</summary>
    public long Underruns { get { return plain.Underruns; } }

    internal long Said(string name, long otherwise) // in the HANDSHAKE; null is otherwise too
    {
        string text;
        long value;
        return Format.TryGetValue(name, out text) && long.TryParse(text, out value) ? value : otherwise;
    }

    /// <summary>How many voices the process takes at once; 0: it takes none.</summary>
    public int MaxStreams { get { return hasRing ? (int)Said("max_streams", 0) : 0; } }

    /// <summary>A voice for one utterance. An InvalidOperationException says why there is none.</summary>
    public MossnanoVoice Open(MossnanoVoiceOptions maybeOptions = null)
    {
        if (state != MossnanoState.Ready) throw new InvalidOperationException("the client is not Ready: see State");
        if (MaxStreams < 1)
            throw new InvalidOperationException("the process takes one stream at a time (its HANDSHAKE has no "
                + "max_streams): update it, start it without --max-streams 0, or feed the client itself");
        var voice = new MossnanoVoice(this, maybeOptions ?? new MossnanoVoiceOptions());
        byte[] settings = Encoding.ASCII.GetBytes(voice.Settings);
        lock (gate)
        {
            if (state != MossnanoState.Ready) throw new InvalidOperationException("the process has just ended");
            voice.number = numbersUsed++; // under the gate, as its first message: numbers only grow on their way
            voices.Add(voice);
            Enqueue(voice, Settings, settings, 0, settings.Length);
        }
        return voice;
    }

    public void Dispose()
    {
        if (isStopping) return;
        isStopping = true;
        stopping.Set();
        Cancel();
        lock (gate)
        {
            foreach (MossnanoVoice voice in voices) voice.Silence();
            isClosing = true;
            Monitor.PulseAll(gate);
        }
        bool isReader = Thread.CurrentThread == reader; // called by OnError
        if (isReader || !reader.Join(StopMs)) Kill();
        if (!isReader) reader.Join(StopMs);
        if (!isReader && writer != null) writer.Join(StopMs);
        state = MossnanoState.Stopped;
    }

    // --- the process ------------------------------------------------------------------------------------------------

    const string TooLate = "no HANDSHAKE in time: allow more startSeconds, or look at its stderr";

    void Run() // what the reader does
    {
        while (RunProcess())
        {
            int pause = Math.Min(FirstPauseMs << Math.Min(restartsInARow, 10), LongestPauseMs);
            restartsInARow++;
            if (stopping.WaitOne(pause)) break;
            restarts++;
        }
        if (isStopping) state = MossnanoState.Stopped;
        started.Set();
    }

    bool RunProcess() // says whether it is to be started again
    {
        fatalWasSaid = isLate = false;
        string whyNot = StartProcess();
        if (whyNot != null) return Bury("not_started", whyNot);
        Thread log = StartLog();
        int launch = launches;
        using (new Timer(_ => EndIfLate(launch), null, patience, Timeout.InfiniteTimeSpan)) ReadMessages();
        process.WaitForExit();
        if (log != null) log.Join(StopMs); // its last lines say why
        int status = process.ExitCode;
        process.Dispose();
        if (isLate) return Bury("timeout", TooLate);
        return Bury("process_ended", "the process ended by itself with status " + status + ": its stderr says more");
    }

    string StartProcess() // says why it cannot be started
    {
        string[] command = options.Command;
        var words = new StringBuilder();
        for (int i = 1; i < command.Length; i++) words.Append(Quoted(command[i])).Append(' ');
        var how = new ProcessStartInfo(command[0], words.ToString())
        {
            UseShellExecute = false, CreateNoWindow = true, RedirectStandardInput = true, RedirectStandardOutput = true,
            RedirectStandardError = options.Log != null,
        };
        if (options.Log != null) how.StandardErrorEncoding = Encoding.UTF8;
        try { process = StartWithoutPreamble(how); }
        catch (Win32Exception error)
        {
            return command[0] + " cannot be started (" + error.Message + "): is it installed and on the PATH?";
        }
        output = process.StandardOutput.BaseStream;
        Stream input = process.StandardInput.BaseStream;
        int launch;
        lock (gate)
        {
            launch = ++launches;
        }
        pid = process.Id;
        writer = new Thread(() => Write(input, launch)) { IsBackground = true, Name = "Mossnano writer" };
        writer.Start();
        if (isStopping) Kill(); // Dispose came too early to do it
        if (process.StandardInput.Encoding.GetPreamble().Length == 0) return null;
        Kill();
        return "a byte order mark went before our first message: set Console.InputEncoding = new UTF8Encoding(false)";
    }

    Thread StartLog()
    {
        if (options.Log == null) return null;
        StreamReader lines = process.StandardError;
        var log = new Thread(() => ReadLog(lines)) { IsBackground = true, Name = "Mossnano log" };
        log.Start();
        return log;
    }

    void ReadLog(StreamReader lines)
    {
        string line;
        do
        {
            try { line = lines.ReadLine(); }
            catch (IOException) { return; }
            catch (ObjectDisposedException) { return; } // a child of the process held on to its stderr for too long
            if (line != null) options.Log(line);
        } while (line != null);
    }

    void EndIfLate(int launch)
    {
        lock (gate)
        {
            if (state != MossnanoState.Starting || launch != launches) return;
            isLate = true;
        }
        Kill();
    }

    void Kill()
    {
        try { if (process != null) process.Kill(); }
        catch (InvalidOperationException) { } // it is gone already
        catch (Win32Exception) { }            // it is going
    }

    // A process that never became ready would not do so the next time.
    bool MayRestart { get { return hasRing && !isStopping && restartsInARow < options.Restart; } }

    bool Bury(string code, string message) // what came of its streams can still be pulled, and then fades out
    {
        bool isRestarted = MayRestart;
        var lost = new List<long>();
        lock (gate)
        {
            for (long number = Math.Max(plain.ended, cancelled); number < plain.opened; number++) lost.Add(number);
            launches++;
            queue.Clear();
            queuedBytes = 0;
            Monitor.PulseAll(gate);
            plain.isOpen = plain.isSounding = false;
            plain.CutHere();
            plain.AnswerCancel(plain.opened, plain.cancels);
            pid = 0;
            if (!fatalWasSaid) fault = code == "process_ended" ? message + " (" + code + ")" : message;
            foreach (MossnanoVoice voice in voices)
            {
                if (!voice.IsOver) voice.CutHere();
                voice.End(fault);
            }
            if (!isRestarted) Reason = fault;
            state = isRestarted ? MossnanoState.Starting : isStopping ? MossnanoState.Stopped : MossnanoState.Failed;
        }
        if (isStopping) return false;
        if (lost.Count > 0 && options.OnLost != null) options.OnLost(lost.ToArray());
        string without = lost.Count > 0 ? ", without what was fed to the streams " + string.Join(", ", lost) : "";
        if (isRestarted) Say(code, message + "; it is started again" + without, true);
        else if (!fatalWasSaid) Say(code, message, true);
        return isRestarted;
    }

    // --- the reader -------------------------------------------------------------------------------------------------

    void ReadMessages()
    {
        var head = new byte[HeadBytes];
        var payload = new byte[LongestMessage];
        while (ReadAll(head, HeadBytes))
        {
            uint length = head[0] | (uint)head[1] << 8 | (uint)head[2] << 16 | (uint)head[3] << 24;
            bool isMessage = length >= 1 && length <= LongestMessage;
            if (!isMessage) Say("framing_lost", "the program does not speak the protocol: does something print to its stdout?", true);
            if (isMessage && !ReadAll(payload, (int)length - 1)) break;
            if (isMessage && Take(head[4], payload, (int)length - 1)) continue;
            Kill();
            break;
        }
    }

    bool ReadAll(byte[] into, int bytes)
    {
        try
        {
            for (int got, at = 0; at < bytes; at += got)
                if ((got = output.Read(into, at, bytes - at)) <= 0) return false;
            return true;
        }
        catch (IOException) { return false; }
    }

    bool Take(int kind, byte[] payload, int bytes) // unknown kinds and keys are passed over
    {
        bool isEnd = (kind & ~Numbered) == End;
        if (isEnd && fatalWasSaid) return true; // behind a fatal ERROR it says what was sent, which is not all
        if (kind >= Numbered) return TakeNumbered(kind & ~Numbered, payload, bytes);
        if (kind == Audio && hasRing) plain.Push(payload, 0, bytes / 2);
        if (kind != Handshake && kind != Error && kind != End) return true;
        var said = Fields(Encoding.UTF8.GetString(payload, 0, bytes));
        if (kind == Handshake && state == MossnanoState.Starting) return ShakeHands(said);
        if (kind == Error) Say(said["code"], said["message"], said["fatal"] == "true");
        if (kind == End) FinishStream(said);
        return true;
    }

    bool TakeNumbered(int kind, byte[] payload, int bytes) // whoever is not there any more was closed
    {
        if (bytes < NumberBytes) return true;
        uint number = BitConverter.ToUInt32(payload, 0);
        Dictionary<string, string> maybeError = null;
        lock (gate)
        {
            MossnanoVoice maybeVoice = voices.Find(voice => voice.number == number && !voice.IsOver);
            if (maybeVoice == null) return true;
            if (kind == Error) maybeError = Fields(Encoding.UTF8.GetString(payload, NumberBytes, bytes - NumberBytes));
            maybeVoice.Take(kind, payload, bytes, maybeError);
        }
        if (kind == End) restartsInARow = 0;
        if (maybeError != null) Say(maybeError["code"], maybeError["message"], maybeError["fatal"] == "true");
        return true;
    }

    bool ShakeHands(Dictionary<string, string> said)
    {
        Func<string, int> number = name =>
        {
            string text;
            int value;
            return said.TryGetValue(name, out text) && int.TryParse(text, out value) ? value : 0;
        };
        var numbers = new[]
        {
            "sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes", "max_audio_bytes",
        };
        string direction;
        bool isOurs = number("protocol") == 1 && said.TryGetValue("direction", out direction) && direction == "decode";
        foreach (string name in numbers) isOurs &= number(name) >= 1;
        if (!isOurs)
        {
            Say("handshake", "this is no decoder of protocol 1: update Mossnano.cs, or drop --encode", true);
            return false;
        }
        string form;
        if (said.TryGetValue("sample_format", out form) && form != "s16le")
        {
            Say("handshake", "Mossnano.cs takes s16le: drop --sample-format", true);
            return false;
        }
        foreach (string name in numbers)
            if (hasRing && said[name] != Format[name])
            {
                string change = name + " was " + Format[name] + " and is now " + said[name];
                Say("handshake", change + ": start a new voice for other weights", true);
                return false;
            }
        Format = said;
        string version, demo;
        Version = said.TryGetValue("version", out version) ? version : "";
        Demo = said.TryGetValue("demo", out demo) && demo == "true";
        SampleRate = number("sample_rate"); Channels = number("channels"); FrameSamples = number("frame_samples");
        Quantizers = number("quantizers"); CodebookSize = number("codebook_size");
        FrameBytes = number("frame_bytes"); MaxAudioBytes = number("max_audio_bytes");
        if (!hasRing)
        {
            int samples = (int)(options.RingSeconds * SampleRate) + MaxAudioBytes / 2 / Channels;
            plain.MakeRing(samples, options.FadeMs, options.PrebufferMs);
        }
        hasRing = true;
        lock (gate)
        {
            if (isLate) return false;
            state = MossnanoState.Ready;
        }
        started.Set();
        return true;
    }

    void FinishStream(Dictionary<string, string> said)
    {
        plain.EndHere();
        if (said["cancelled"] != "true")
        {
            Interlocked.Increment(ref plain.ended);
            restartsInARow = 0;
            return;
        }
        string[] echo = said["echo"].Split(' ');
        CultureInfo plainly = CultureInfo.InvariantCulture;
        plain.AnswerCancel(long.Parse(echo[0], plainly), int.Parse(echo[1], plainly));
    }

    void Say(string code, string message, bool fatal)
    {
        fatalWasSaid |= fatal;
        if (isStopping) return;
        if (fatal || !hasRing) fault = message + " (" + code + ")";
        if (onError != null && (hasRing || !startThrows)) onError(code, message, fatal && !MayRestart);
    }

    // --- the writer -------------------------------------------------------------------------------------------------

    // Whoever calls one of these holds the gate.

    internal void EnqueueCancel(MossnanoVoice voice)
    {
        Enqueue(voice, CancelKind, new byte[0], 0, 0, true);
        queue.First.Value.Owner = null; // what is closed drops its own
    }

    internal void DropQueued(MossnanoVoice voice)
    {
        for (LinkedListNode<Message> next, node = queue.First; node != null; node = next)
        {
            next = node.Next;
            if (node.Value.Owner != voice) continue;
            queuedBytes -= node.Value.Bytes.Length;
            queue.Remove(node);
        }
    }

    internal void Enqueue(MossnanoVoice voice, int kind, byte[] payload, int at, int bytes, bool isFirst = false)
    {
        var message = new Message { Owner = voice, Bytes = NewMessage(voice, kind, bytes) };
        Buffer.BlockCopy(payload, at, message.Bytes, message.Bytes.Length - bytes, bytes); // the caller may use it again
        if (isFirst) queue.AddFirst(message);
        else queue.AddLast(message);
        queuedBytes += message.Bytes.Length;
        Monitor.PulseAll(gate);
    }

    static byte[] NewMessage(MossnanoVoice voice, int kind, int bytes) // but for its payload
    {
        int numberBytes = voice.isNumbered ? NumberBytes : 0;
        var message = new byte[HeadBytes + numberBytes + bytes];
        for (int i = 0; i < 4; i++) message[i] = (byte)(numberBytes + bytes + 1 >> 8 * i);
        message[4] = (byte)(voice.isNumbered ? kind | Numbered : kind);
        for (int i = 0; i < numberBytes; i++) message[HeadBytes + i] = (byte)(voice.number >> 8 * i);
        return message;
    }

    byte[] MaybeCredit() // where a voice was pulled so far that some is due
    {
        foreach (MossnanoVoice voice in voices)
        {
            long granted = voice.CreditDue();
            if (granted == 0) continue;
            byte[] message = NewMessage(voice, Credit, 8);
            for (int i = 0; i < 8; i++) message[message.Length - 8 + i] = (byte)(granted >> 8 * i);
            queuedBytes += message.Length; // until it is written, as all that the writer takes
            return message;
        }
        return null;
    }

    void Write(Stream input, int launch)
    {
        for (byte[] message = null; (message = NextToWrite(message, launch)) != null;)
            try { input.Write(message, 0, message.Length); input.Flush(); }
            catch (IOException) { }             // the reader finds out why
            catch (ObjectDisposedException) { }
        try { input.Close(); } catch (IOException) { }
    }

    byte[] NextToWrite(byte[] maybeWritten, int launch) // null: that was all, for the process of that launch
    {
        lock (gate)
        {
            if (maybeWritten != null && launch == launches) queuedBytes -= maybeWritten.Length;
            while (launch == launches)
            {
                byte[] maybeCredit = MaybeCredit();
                if (maybeCredit != null) return maybeCredit;
                if (queue.Count > 0) break;
                if (isClosing) return null;
                Monitor.Wait(gate, voices.Count > 0 ? CreditMs : Timeout.Infinite); // nobody wakes us for a pull
            }
            if (launch != launches) return null;
            Message next = queue.First.Value;
            queue.RemoveFirst();
            if (next.Owner != null) next.Owner.hasLeft = true;
            return next.Bytes;
        }
    }

    // The texts, numbers, true and false of the outermost JSON object, as texts.
    static Dictionary<string, string> Fields(string json)
    {
        var fields = new Dictionary<string, string>();
        string maybeKey = null;
        int depth = 0;
        for (int at = 0; at < json.Length; at++)
        {
            char c = json[at];
            if (c == '{' || c == '[') { depth++; if (depth > 1) maybeKey = null; }
            else if (c == '}' || c == ']') depth--;
            else if (c == '"')
            {
                string text = Text(json, ref at);
                if (depth != 1) continue;
                if (maybeKey == null) maybeKey = text;
                else { fields[maybeKey] = text; maybeKey = null; }
            }
            else if (depth == 1 && maybeKey != null && (char.IsLetterOrDigit(c) || c == '-'))
            {
                int start = at;
                while (at + 1 < json.Length && ",}] \t\r\n".IndexOf(json[at + 1]) < 0) at++;
                fields[maybeKey] = json.Substring(start, at + 1 - start);
                maybeKey = null;
            }
        }
        return fields;
    }

    static string Text(string json, ref int at) // from the opening quote to the closing one
    {
        var text = new StringBuilder();
        for (at++; at < json.Length && json[at] != '"'; at++)
        {
            if (json[at] != '\\' || at + 1 >= json.Length) { text.Append(json[at]); continue; }
            char c = json[++at];
            if (c == 'u' && at + 4 < json.Length) { text.Append((char)Convert.ToInt32(json.Substring(at + 1, 4), 16)); at += 4; }
            else text.Append("bfnrt".IndexOf(c) >= 0 ? ' ' : c);
        }
        return text.ToString();
    }

    // .NET Framework and Mono open stdin with a StreamWriter, and write its encoding's byte order mark at once, before
    // our first message. The encoding is Console.InputEncoding, unless there is a StandardInputEncoding (Mono 6, .NET
    // Core 2.1 and later). Where there is none, the host's own encoding is put aside for the moment, in its field: the
    // public setter would reopen the host's console streams.
    static readonly object oneAtATime = new object();

    static Process StartWithoutPreamble(ProcessStartInfo how)
    {
        var plain = new UTF8Encoding(false);
        PropertyInfo encoding = typeof(ProcessStartInfo).GetProperty("StandardInputEncoding");
        FieldInfo field = typeof(Console).GetField("_inputEncoding", BindingFlags.Static | BindingFlags.NonPublic)
            ?? typeof(Console).GetField("inputEncoding", BindingFlags.Static | BindingFlags.NonPublic);
        if (encoding != null) encoding.SetValue(how, plain, null);
        bool hasPreamble = encoding == null && Console.InputEncoding.GetPreamble().Length > 0;
        if (!hasPreamble || field == null) return Process.Start(how);
        lock (oneAtATime)
        {
            object hosts = field.GetValue(null);
            field.SetValue(null, plain);
            try { return Process.Start(how); }
            finally { field.SetValue(null, hosts); }
        }
    }

    static string Quoted(string word) // as the C runtime takes it apart again; Mono reads it alike
    {
        var quoted = new StringBuilder("\"");
        int slashes = 0;
        foreach (char c in word)
        {
            if (c == '"') quoted.Append('\\', slashes + 1);
            slashes = c == '\\' ? slashes + 1 : 0;
            quoted.Append(c);
        }
        return quoted.Append('\\', slashes).Append('"').ToString();
    }
}

// One utterance; or, inside the client, all that it says itself. Any thread may call these, but for Pull: one at a time.
// Feed and Mark answer false where it is over or finished, and where too much waits: 768 KiB of frames that the process
// did not decode, 128 marks that nobody took. Then OnError is told `queue_full`.
public sealed class MossnanoVoice : IDisposable
{
    internal const int SampleBits = 40;   // of `played`: below the number of the stream
    const int MostBeginnings = 256;       // streams that may begin in the ring
    const int MostMarks = 128;            // that nobody took yet, and
    const int MostBytes = 3 << 18;        // of frames without sound yet: less than the 1 MiB that may wait over there
    const int LongestMark = 1000;         // bytes
    const int CreditsASecond = 50;        // at most
    const int Unity = 1 << 16;            // as a gain

    readonly Mossnano client;
    internal readonly bool isNumbered;
    internal uint number;                 // of its stream, where it has one
    internal bool isOpen, hasLeft, hasEnd; // under the client's gate: what is fed belongs to a stream that was begun;
                                          // which was opened over there, or is about to be; and which ended there
    long fedBytes, window, granted, frameSamples; // under it too: the last three are samples of ours
    int priority, marksOut;
    readonly Queue<MossnanoMark> marks = new Queue<MossnanoMark>(); // that came, and nobody took
    string fault = "", reason = "";
    short[] ring;                         // values, not samples; indices only grow, % Length says where they are
    int channels;
    long prebuffer;                       // values
    bool isMono;
    long written, taken, dropBefore;      // moved by: reader, puller, reader
    long endOfStream;                     // the reader's: where the last stream that is over ended in the ring,
    long cutAt;                           // and where the last one broke off that was lost
    readonly long[] beginAt = new long[MostBeginnings], beginStream = new long[MostBeginnings];
    long begun, begunHeard;               // moved by: reader, puller. Where in the ring which stream begins
    long lastBegun = -1;                  // the reader's
    internal long opened, ended;          // streams
    internal int cancels, cancelsAnswered;
    long underruns;                       // pulls
    internal volatile bool isSounding;    // PCM of a stream came, its END did not
    volatile int gain = Unity;

    internal MossnanoVoice(Mossnano client)
    {
        this.client = client;
    }

    internal MossnanoVoice(Mossnano client, MossnanoVoiceOptions options) : this(client)
    {
        bool isGood = options.RingSeconds >= 0 && options.RingSeconds <= 600 && options.PrebufferMs >= 0;
        isGood &= options.PrebufferMs <= 60000 && options.FadeMs >= 0 && options.FadeMs <= 60000;
        if (!isGood || options.Gain < 0 || options.Gain > 100 || options.Priority < -4 || options.Priority > 3)
            throw new ArgumentException(FormattableString.Invariant($"RingSeconds {options.RingSeconds}, PrebufferMs ")
                + FormattableString.Invariant($"{options.PrebufferMs}, FadeMs {options.FadeMs}, Gain {options.Gain}, ")
                + "Priority " + options.Priority + ": 0 to 600, 0 to 60,000 (both), 0 to 100 and -4 to 3 are allowed");
        long codecRate = client.Said("codec_sample_rate", client.SampleRate);
        frameSamples = Math.Max(1, client.FrameSamples * (long)client.SampleRate / codecRate);
        long chunk = (client.Said("chunk_frames", 1) * client.FrameSamples * client.SampleRate + codecRate - 1) / codecRate;
        if (codecRate != client.SampleRate) chunk = Math.Max(chunk, client.SampleRate / 10); // resampling keeps 81 ms
        long least = (long)(options.PrebufferMs * client.SampleRate / 1000) + chunk; // or the prebuffer could never fill
        window = granted = Math.Max((long)(options.RingSeconds * client.SampleRate), least);
        isNumbered = isOpen = true;
        isMono = options.Mono;
        priority = options.Priority;
        opened = begun = 1; // its stream begins where its ring does
        lastBegun = 0;
        Gain = options.Gain;
        gainIs = gain;
        MakeRing((int)window, options.FadeMs, options.PrebufferMs);
    }

    internal void MakeRing(int samples, double fadeMs, double prebufferMs)
    {
        channels = client.Channels;
        ring = new short[samples * channels];
        last = new short[channels];
        fadeSamples = (int)(fadeMs * client.SampleRate / 1000);
        prebuffer = (long)(prebufferMs * client.SampleRate / 1000) * channels;
    }

    /// <summary>Adds packed frames, FrameBytes each.</summary>
    public bool Feed(byte[] packed)
    {
        if (client.State != MossnanoState.Ready) return false;
        int frameBytes = client.FrameBytes;
        if (packed.Length % frameBytes != 0)
            throw new ArgumentException(packed.Length + " bytes are no whole frames: feed a multiple of " + frameBytes);
        int most = Math.Max(1, Mossnano.PieceBytes / frameBytes) * frameBytes;
        int pieces = Math.Max(1, (packed.Length + most - 1) / most); // an empty TOKENS too opens a stream, for its END
        string maybeFull;
        lock (client.gate)
        {
            if (client.State != MossnanoState.Ready || (isNumbered && !isOpen)) return false;
            int headBytes = Mossnano.HeadBytes + Mossnano.NumberBytes;
            maybeFull = MaybeFull(packed.Length + (long)pieces * headBytes, packed.Length);
            if (maybeFull == null)
            {
                if (!isOpen) Interlocked.Increment(ref opened);
                isOpen = true;
                fedBytes += packed.Length;
                for (int at = 0, piece = 0; piece < pieces; piece++, at += most)
                    client.Enqueue(this, Mossnano.Tokens, packed, at, Math.Min(most, packed.Length - at));
                return true;
            }
        }
        Refuse(maybeFull);
        return false;
    }

    string MaybeFull(long bytes, int frameBytes) // why so many, so many of them of frames, cannot wait; under the gate
    {
        string advice = " are allowed, feed less or later";
        if (client.queuedBytes + bytes > Mossnano.QueueBytes)
            return client.queuedBytes + " bytes wait for the process to take them, and " + bytes + " more were fed: "
                + Mossnano.QueueBytes + " (4 MiB)" + advice;
        if (!isNumbered) return null;
        long ahead = fedBytes - Volatile.Read(ref written) / channels / frameSamples * client.FrameBytes;
        if (ahead + frameBytes <= MostBytes) return null;
        return ahead + " bytes of frames wait to be decoded in this voice, and " + frameBytes + " more were fed: "
            + MostBytes + advice;
    }

    void Refuse(string why)
    {
        if (client.options.OnError != null) client.options.OnError("queue_full", why, false);
    }

    /// <summary>The same for codes, Quantizers for each frame.</summary>
    public bool FeedCodes(int[] codes)
    {
        if (client.State != MossnanoState.Ready) return false;
        if (codes.Length % client.Quantizers != 0)
            throw new ArgumentException(codes.Length + " codes are no whole frames: feed a multiple of " + client.Quantizers);
        int bits = 0;
        while (1 << bits < client.CodebookSize) bits++;
        var packed = new byte[codes.Length / client.Quantizers * client.FrameBytes];
        for (int i = 0; i < codes.Length; i++)
        {
            if (codes[i] < 0 || codes[i] >= client.CodebookSize)
                throw new ArgumentException("code " + codes[i] + ": 0 to " + (client.CodebookSize - 1) + " are allowed");
            for (int bit = 0; bit < bits; bit++) // least significant first; each frame starts at a byte
            {
                int at = i % client.Quantizers * bits + bit;
                packed[i / client.Quantizers * client.FrameBytes + at / 8] |= (byte)((codes[i] >> bit & 1) << at % 8);
            }
        }
        return Feed(packed);
    }

    /// <summary>The utterance is complete.</summary>
    public bool Finish()
    {
        lock (client.gate)
        {
            if (isOpen) client.Enqueue(this, Mossnano.End, new byte[0], 0, 0);
            isOpen = false;
            return client.State == MossnanoState.Ready && Reason.Length == 0;
        }
    }

    /// <summary>A place between what was fed and what will be, with up to 1,000 bytes for TakeMark, which gives them
    /// when that place is played.</summary>
    public bool Mark(string text) { return Mark(Encoding.UTF8.GetBytes(text)); }

    public bool Mark(byte[] bytes)
    {
        if (bytes.Length > LongestMark)
            throw new ArgumentException("a mark of " + bytes.Length + " bytes: " + LongestMark + " are allowed");
        string maybeFull;
        lock (client.gate)
        {
            if (!isNumbered || !isOpen) return false;
            maybeFull = MaybeFull(bytes.Length + Mossnano.HeadBytes + Mossnano.NumberBytes, 0);
            if (marksOut == MostMarks)
                maybeFull = marksOut + " marks were not taken: take those that were played, or mark later";
            if (maybeFull == null)
            {
                marksOut++;
                client.Enqueue(this, Mossnano.MarkKind, bytes, 0, bytes.Length);
                return true;
            }
        }
        Refuse(maybeFull);
        return false;
    }

    /// <summary>The next mark whose place was pulled.</summary>
    public bool TakeMark(out MossnanoMark mark)
    {
        mark = default(MossnanoMark);
        lock (client.gate)
        {
            long heard = Played;
            // Then a mark may be behind the last sample.
            bool isAll = hasEnd && cancels == 0 && Volatile.Read(ref taken) == written;
            if (marks.Count == 0 || marks.Peek().Sample > (isAll ? heard : heard - 1)) return false;
            mark = marks.Dequeue();
            marksOut--;
            return true;
        }
    }

    /// <summary>Be silent, now. Says how many samples were heard.</summary>
    public long Cancel()
    {
        lock (client.gate) Silence();
        return Played;
    }

    /// <summary>A factor, 0 to 100. The next Pull goes there from what holds.</summary>
    public double Gain
    {
        get { return gain / (double)Unity; }
        set { gain = (int)(Unity * Math.Max(0, Math.Min(100, value))); }
    }

    /// <summary>Samples that were pulled; a fade-out counts for nothing.</summary>
    public long Played
    {
        get
        {
            long both = Volatile.Read(ref played);
            return both < 0 ? 0 : both & (1L << SampleBits) - 1;
        }
    }

    /// <summary>Pulls that found the ring dry in the middle of a stream.</summary>
    public long Underruns { get { return Interlocked.Read(ref underruns); } }

    /// <summary>Once it is over: what went wrong, or "".</summary>
    public string Reason { get { return IsOver ? Volatile.Read(ref reason) : ""; } }

    /// <summary>Is something to be pulled, now or later?</summary>
    public bool IsSpeaking
    {
        get
        {
            bool moreComes = !IsOver; // asked first: what came is in the ring
            long end = Volatile.Read(ref written);
            return moreComes || (Volatile.Read(ref taken) < end && Volatile.Read(ref dropBefore) < end && !IsCancelled);
        }
    }

    public void Dispose()
    {
        lock (client.gate)
        {
            if (!isNumbered || !client.voices.Remove(this)) return;
            Silence();
            client.DropQueued(this);
        }
    }

    /// <summary>Fills pcm, all channels interleaved, or one where it is Mono: with samples, a fade-out where they break
    /// off, and silence. Returns how many samples of all channels are real.</summary>
    public int Pull(short[] pcm)
    {
        Array.Clear(pcm, 0, pcm.Length);
        if (ring == null) return 0;
        BeginPull(pcm.Length / (isMono ? 1 : channels));
        for (int i = 0; i < audible; i++)
        {
            int sum = 0;
            for (int channel = 0; channel < channels; channel++)
            {
                int value = Value(i, channel);
                sum += value;
                if (!isMono) pcm[i * channels + channel] = Amplified(i, value);
            }
            if (isMono) pcm[i] = Amplified(i, sum / channels);
        }
        return EndPull();
    }

    /// <summary>The same as floats, for as many channels as the engine has: one gets the mean of all of ours, two and
    /// more get ours in the front pair, and silence in the rest.</summary>
    public int Pull(float[] data, int wanted)
    {
        Array.Clear(data, 0, data.Length);
        if (ring == null) return 0;
        BeginPull(data.Length / wanted);
        for (int i = 0; i < audible; i++)
        {
            float gainNow = GainAt(i) / (float)Unity, mean = 0;
            for (int channel = 0; channel < channels; channel++)
                mean += Value(i, channel) * gainNow / 32767f / channels;
            for (int channel = 0; channel < Math.Min(2, wanted); channel++) // centre, bass and rears stay silent
            {
                float own = Value(i, Math.Min(channel, channels - 1)) * gainNow / 32767f;
                data[i * wanted + channel] = isMono || wanted == 1 ? mean : own;
            }
        }
        return EndPull();
    }

    // --- what comes of the process; but for Push, all under the gate ------------------------------------------------

    internal string Settings
    {
        get { return FormattableString.Invariant($"{{\"window_samples\":{window},\"urgency\":{3 - priority}}}"); }
    }

    internal bool IsOver { get { return Interlocked.Read(ref ended) == Interlocked.Read(ref opened); } }

    internal void Take(int kind, byte[] payload, int bytes, Dictionary<string, string> maybeError)
    {
        int from = Mossnano.NumberBytes, values = (bytes - from) / 2;
        bool hasRoom = values <= ring.Length - (written - Volatile.Read(ref taken));
        if (kind == Mossnano.Audio && hasRoom) Push(payload, from, values);
        else if (kind == Mossnano.Audio) End("the process sent more than it was granted");
        if (kind == Mossnano.MarkKind && bytes >= from + 8)
        {
            var text = new byte[bytes - from - 8];
            Buffer.BlockCopy(payload, from + 8, text, 0, text.Length);
            marks.Enqueue(new MossnanoMark(BitConverter.ToInt64(payload, from), text));
        }
        if (kind == Mossnano.Error && fault.Length == 0)
        {
            string code = maybeError["code"];
            fault = maybeError["message"] + " (" + code + ")";
            if (code == "too_many_streams" || code == "late_stream") End(fault); // no END follows
        }
        if (kind == Mossnano.End)
        {
            hasEnd = true;
            EndHere();
            End(fault);
        }
    }

    internal void End(string why)
    {
        if (IsOver) return;
        Volatile.Write(ref reason, why);
        isSounding = isOpen = false;
        Interlocked.Exchange(ref ended, opened); // only now: who sees it may read the reason
    }

    internal void EndHere()
    {
        Volatile.Write(ref endOfStream, written);
        isSounding = false;
    }

    internal void CutHere() { Volatile.Write(ref cutAt, written); }

    internal void Silence()
    {
        Interlocked.Increment(ref cancels); // for ever: its number is never used again
        if (IsOver) return;
        client.DropQueued(this); // if its first message is among them, there is no stream to cancel
        if (hasLeft) client.EnqueueCancel(this);
        End("");
    }

    internal long CreditDue() // all that was pulled and the window; 0: it is not worth a message
    {
        long all = window + Volatile.Read(ref taken) / channels, more = all - granted;
        bool isDry = Volatile.Read(ref taken) == written; // and waits for what is granted now
        bool isWorthIt = more >= client.SampleRate / CreditsASecond || (more > 0 && isDry);
        if (!isWorthIt || !hasLeft || IsOver) return 0;
        return granted = all;
    }

    internal void Push(byte[] pcm, int from, int values)
    {
        if (lastBegun != Interlocked.Read(ref ended)) BeginStream();
        for (int i = 0; i < values && !IsCancelled && !client.isStopping;)
        {
            long at = written, room = ring.Length - (at - Volatile.Read(ref taken));
            if (room == 0) { Thread.Sleep(2); continue; } // asleep, not signalled: the puller must not touch a lock
            long end = at + Math.Min(room, values - i);
            for (; at < end; at++, i++) ring[at % ring.Length] = (short)(pcm[from + 2 * i] | pcm[from + 2 * i + 1] << 8);
            Volatile.Write(ref written, end);
            isSounding = true;
        }
    }

    void BeginStream() // a stream begins here
    {
        while (begun - Volatile.Read(ref begunHeard) == MostBeginnings)
        {
            if (IsCancelled || client.isStopping) return; // nothing of it will be pulled
            Thread.Sleep(2);
        }
        lastBegun = Interlocked.Read(ref ended);
        beginAt[begun % MostBeginnings] = written;
        beginStream[begun % MostBeginnings] = lastBegun;
        Volatile.Write(ref begun, begun + 1);
    }

    internal void AnswerCancel(long streams, int number) // all that were open at it are over
    {
        Interlocked.Exchange(ref ended, streams);
        if (IsCancelled) Volatile.Write(ref dropBefore, written);
        Volatile.Write(ref cancelsAnswered, number);
    }

    bool IsCancelled { get { return Volatile.Read(ref cancels) != Volatile.Read(ref cancelsAnswered); } }

    // --- the puller -------------------------------------------------------------------------------------------------
    // Without a lock against the reader. A pull is `real` samples from `pullAt`, then a fade-out, then silence.

    long pullAt;
    int real, audible;               // samples of this pull; audible: the real ones and the fade-out
    int droppedLeft;                 // samples that a CANCEL dropped, and that its fade-out may still use
    int fadeSamples, level;          // level: how loud we are, from 0 to fadeSamples; less only in and after a fade
    bool isFadingOut, wasCut, fadesDropped, isComplete;
    bool isGathering, isFresh;       // fresh: nothing of the stream was given yet: no fade-in, unless we were cut off
    int noticedCancels;
    long gainWas, gainIs = Unity;    // at the beginning and at the end of the pull
    long cutHeard;                   // the last cutAt that we came to
    long nextStream = -1, stream = -1, heard;         // that is being given out, and how many samples of it were
    internal long played = -1L << SampleBits; // both, for other threads
    short[] last;                    // the last sample that was given: a fade-out holds it where nothing follows

    void BeginPull(int wanted)
    {
        gainWas = gainIs;
        gainIs = gain;
        bool wasSounding = isSounding; // asked before the ring is looked at: what it told of is in there
        long cut = Volatile.Read(ref cutAt);
        long over = Volatile.Read(ref endOfStream);
        long end = Volatile.Read(ref written);
        int number = Volatile.Read(ref cancels); // asked after it: what lies before the end was fed before that CANCEL
        bool isCancelled = number != Volatile.Read(ref cancelsAnswered);
        long dropped = isCancelled ? end : Volatile.Read(ref dropBefore);
        if (number != noticedCancels && level > 0 && !isFadingOut) isFadingOut = wasCut = fadesDropped = true;
        noticedCancels = number;

        real = 0;
        isComplete = false;
        pullAt = isFadingOut ? taken : Math.Max(taken, dropped);
        droppedLeft = isFadingOut && fadesDropped ? (int)Math.Max(0, (dropped - taken) / channels) : 0;
        if (!isFadingOut) // a fade-out is finished first
        {
            bool isDry = TakeReal(wanted, cut, over, end);
            if (isDry && wasSounding && isSounding && !isCancelled) Interlocked.Increment(ref underruns);
        }
        audible = isFadingOut ? Math.Min(wanted, real + Math.Min(fadeSamples, level + real)) : real;
    }

    bool TakeReal(int wanted, long cut, long over, long end) // says whether the ring was dry
    {
        long at = pullAt;
        bool isCut = false; // what follows is another stream, but this one's last sample is not its end
        while (real < wanted)
        {
            isCut = at == cut && cut != cutHeard && level + real > 0;
            if (at == cut) cutHeard = cut;
            if (isCut) break;
            TakeBeginnings(at);
            bool isEnough = end - at >= prebuffer;
            bool isWhole = over > at || cut > at; // more of this stream does not come
            bool isGathered = !isGathering || (isEnough || isWhole) && end > at;
            long nextBegins = begunHeard < Volatile.Read(ref begun) ? beginAt[begunHeard % MostBeginnings] : end;
            long until = Math.Min(Math.Min(end, nextBegins), cut > at ? cut : end);
            int more = isGathered ? (int)Math.Min(wanted - real, (until - at) / channels) : 0;
            if (more <= 0) break;
            if (isFresh && real == 0 && !wasCut) level = fadeSamples;
            if (isFresh) { stream = nextStream; heard = 0; }
            isFresh = isGathering = wasCut = false;
            real += more;
            heard += more;
            at += more * channels;
        }
        if (real == wanted) return false;
        isComplete = at == over || isGathering; // the stream ends here as it should, with its own last sample
        if (!isComplete && level + real > 0 && fadeSamples > 0) { isFadingOut = wasCut = true; fadesDropped = false; }
        bool isDry = !isGathering && !isCut;
        isGathering = prebuffer > 0;
        return isDry;
    }

    void TakeBeginnings(long at)
    {
        while (begunHeard < Volatile.Read(ref begun) && beginAt[begunHeard % MostBeginnings] <= at)
        {
            isFresh = true;
            nextStream = beginStream[begunHeard % MostBeginnings];
            isGathering = prebuffer > 0;
            Volatile.Write(ref begunHeard, begunHeard + 1);
        }
    }

    long GainAt(int sample) { return gainWas + (gainIs - gainWas) * (sample + 1L) / audible; }

    short Amplified(int sample, int value)
    {
        return (short)Math.Max(short.MinValue, Math.Min(short.MaxValue, value * GainAt(sample) / Unity));
    }

    int Value(int sample, int channel)
    {
        if (sample < real)
        {
            int loud = level + sample + 1, value = ring[(pullAt + (long)sample * channels + channel) % ring.Length];
            return loud >= fadeSamples ? value : (int)((long)value * loud / fadeSamples);
        }
        int left = Math.Min(fadeSamples, level + real) - (sample - real) - 1; // of the fade-out
        int from = droppedLeft > 0 ? Math.Min(sample, droppedLeft - 1) : real - 1;
        int held = from < 0 ? last[channel] : ring[(pullAt + (long)from * channels + channel) % ring.Length];
        return (int)((long)held * left / fadeSamples);
    }

    int EndPull()
    {
        int given = real + Math.Min(audible - real, droppedLeft);
        for (int channel = 0; channel < channels && given > 0; channel++)
            last[channel] = ring[(pullAt + (long)(given - 1) * channels + channel) % ring.Length];
        level = isComplete ? 0 : Math.Min(fadeSamples, level + real) - (audible - real);
        isFadingOut &= level > 0;
        Volatile.Write(ref played, stream << SampleBits | heard);
        // Only now: from here on the reader may write over what was given.
        Volatile.Write(ref taken, pullAt + (long)given * channels);
        return real;
    }
}
